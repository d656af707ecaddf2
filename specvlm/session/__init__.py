"""A loaded pair of models that answers prompts from Python: whole or as a stream, in threads or in asyncio."""
