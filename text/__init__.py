"""Text: corpora, their formats, chat templates, and how a text begins."""
