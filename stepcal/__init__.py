"""stepcal: how long does one step of an LLM server take, and how well can a few learned factors predict it?"""

__version__ = "0.1.0"
