"""What generators that start from documents share: pieces of documents, and checks that nothing was made up."""
