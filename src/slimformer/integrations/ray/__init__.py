"""Work of several processes on Ray.

Embed with Ray Data, as a step of your own pipeline or a whole corpus that is written in shards and can go on; judge the
proposals of `slimformer.optimize`.
"""

from slimformer.integrations.ray.corpus import CorpusRun, embed_corpus
from slimformer.integrations.ray.dataset import embed_dataset
from slimformer.integrations.ray.judges import RayJudges

__all__ = ["CorpusRun", "RayJudges", "embed_corpus", "embed_dataset"]
