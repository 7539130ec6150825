"""The engine: a critic's loss, penalty and every gradient in four passes, with no double backward."""
