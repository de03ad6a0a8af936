"""A run as people read it: plain frozen records, and how they are drawn."""
