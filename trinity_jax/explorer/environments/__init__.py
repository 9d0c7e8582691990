"""What an agent acts upon: text environments, games, tools, documents and a sandbox for code."""
