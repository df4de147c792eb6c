"""Graphs as such: `writer` builds them, `listing` prints them, `dump` keeps what each pass left."""
