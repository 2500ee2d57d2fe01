"""What a recipe will take: memory and time of every stage, predicted before anything is loaded."""
