"""The history of runs in SQLite: schema, journal, writer, reader, retention, removal."""
