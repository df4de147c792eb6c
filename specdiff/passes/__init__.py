"""The compiler: normalize -> axes -> regions -> selective -> emit, one pass per file."""
