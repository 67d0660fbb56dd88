"""The command line: `tallygate up`, checks, management, and the three processes as commands."""
