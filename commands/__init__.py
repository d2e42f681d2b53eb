"""The commands, one file a verb: options, settings, call, print."""
