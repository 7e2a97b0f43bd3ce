"""The GGUF container: what stands in a file's header, checked before any of it is used."""
