"""Python API of a loaded pair of models: answers whole or as a stream, from threads or asyncio."""
