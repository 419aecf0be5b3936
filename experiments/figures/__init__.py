"""The paper's figures of attention, tokens, views and priors."""
