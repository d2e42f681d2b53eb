"""What a folder says of how it was made, and by which it is known to be an export."""

EXPORT_FORMAT = "skipcal.export/1"
EXPORT_FILE = "skipcal_export.json"
