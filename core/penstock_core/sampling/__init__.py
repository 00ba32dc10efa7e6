"""From logits to tokens and text: stateless sampling, penalties, log-probabilities, stop conditions, grammars."""
