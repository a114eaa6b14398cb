"""The documents, and the programs that generate some of their tables and pages."""
