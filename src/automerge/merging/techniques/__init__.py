"""The built-in techniques, one file a family. Each is a plain function registered as an entry point."""
