"""Control: one decision, applied on all ranks at the same optimizer step."""
