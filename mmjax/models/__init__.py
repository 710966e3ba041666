"""Systems: one file per paper, and the towers that papers share."""
