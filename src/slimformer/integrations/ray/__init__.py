"""Embed with Ray Data: a step of your own pipeline, or a whole corpus that is written in shards and can go on."""

from slimformer.integrations.ray.corpus import CorpusRun, embed_corpus
from slimformer.integrations.ray.dataset import embed_dataset

__all__ = ["CorpusRun", "embed_corpus", "embed_dataset"]
