"""What every hall stands on: errors, files and their hashes, settings, plug-ins, texts, chats, pages."""
