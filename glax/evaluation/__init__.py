"""How good a model is: perplexity of text, and the tasks of lm-evaluation-harness (``glax.evaluation.harness``)."""

from glax.evaluation.perplexity import Perplexity, log_likelihoods, perplexity
from glax.evaluation.tables import TABLES, Table, table_text

__all__ = ["TABLES", "Perplexity", "Table", "log_likelihoods", "perplexity", "table_text"]
