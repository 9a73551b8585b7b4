"""The commands of `interp`, one file a group; `interp.cli` puts them together."""
