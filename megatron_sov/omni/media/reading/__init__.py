"""Pictures, sounds and videos of others as numbers, decoded by a process that can take and reach little."""
