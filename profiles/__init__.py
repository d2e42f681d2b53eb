"""What a profile is, how it is read and written, and the profiles that are shipped."""
