"""What generators that start from documents share: their pieces, and checks that nothing was made up."""
