"""Arrays computed by the released code."""
