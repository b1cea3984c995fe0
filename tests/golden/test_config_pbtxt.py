"""What Triton is told of a model, and what fixed weights answer: both change only on purpose."""

from pathlib import Path

import numpy as np
import torch
from serving_world import DOMAIN, NOW_MS, make_model

from features.tensors import tensor_table
from inference.release import Release, config_pbtxt
from inference.scoring import final_scores, head_weights

CONFIG = """\
name: "home-20231114T221320Z-0123abcd"
backend: "python"
max_batch_size: 8
input { name: "sequence_count" data_type: TYPE_INT32 dims: [ 1 ] }
input { name: "sequence_action" data_type: TYPE_INT32 dims: [ 100 ] }
input { name: "sequence_kind" data_type: TYPE_INT32 dims: [ 100 ] }
input { name: "sequence_age_ms" data_type: TYPE_INT64 dims: [ 100 ] }
input { name: "sequence_surface" data_type: TYPE_INT32 dims: [ 100 ] }
input { name: "sequence_value" data_type: TYPE_FP32 dims: [ 100 ] }
input { name: "sequence_embedding" data_type: TYPE_FP16 dims: [ 100, 32 ] }
input { name: "candidate_embedding" data_type: TYPE_FP16 dims: [ -1, 32 ] allow_ragged_batch: true }
input { name: "user_embedding" data_type: TYPE_FP16 dims: [ 32 ] }
input { name: "candidate_kind" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true }
input { name: "user_number" data_type: TYPE_FP32 dims: [ 1 ] }
input { name: "item_list_tags" data_type: TYPE_INT32 dims: [ -1, 4 ] allow_ragged_batch: true }
input { name: "request_category" data_type: TYPE_INT32 dims: [ 1 ] }
input { name: "candidate_number" data_type: TYPE_FP32 dims: [ -1, 1 ] allow_ragged_batch: true }
output { name: "probability" data_type: TYPE_FP32 dims: [ -1, 2 ] }
dynamic_batching { max_queue_delay_microseconds: 0 }
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "release_folder" value: { string_value: "/releases/home" } }
parameters { key: "threads" value: { string_value: "2" } }
"""

PROBABILITY = [[0.6289368, 0.2901469], [0.6668932, 0.4151912], [0.5753051, 0.4175597], [0.5939423, 0.5323139]]
SCORES = [0.4838633, 0.4592977, 0.3665253, 0.3277853]
TOLERANCE = 1e-5


def test_config_pbtxt():
    release = Release(Path("/releases/home"), "home-20231114T221320Z-0123abcd", "home", NOW_MS, DOMAIN, {}, {}, {})
    assert config_pbtxt(release, parameters={"release_folder": "/releases/home", "threads": "2"}, instances=1) == CONFIG


def golden_request(ranker: str, candidates: int) -> dict[str, torch.Tensor]:
    """One request with 60 actions; what lies behind them is not zero, and some values are missing."""
    random = np.random.default_rng(20231114)
    tensors = {}
    for tensor in tensor_table(DOMAIN, ranker):
        shape = [candidates if size == -1 else size for size in tensor.shape]
        if tensor.name == "sequence_age_ms":
            value = np.sort(random.integers(0, 10**9, shape))
        elif tensor.dtype.kind == "i":
            value = random.integers(0, 3, shape)
        else:
            value = random.normal(size=shape)
        if tensor.name.endswith("_embedding"):
            value /= np.sqrt(shape[-1])  # about unit norm, as published vectors have
        tensors[tensor.name] = torch.from_numpy(value.astype(tensor.dtype))
    tensors["sequence_count"][:] = 60
    tensors["candidate_number"][0] = float("nan")
    return tensors


def test_fixed_weights_answer_fixed_scores():
    torch.set_num_threads(1)
    probability = make_model("home", seed=3).probabilities(golden_request("home", 4)).numpy()
    np.testing.assert_allclose(probability, PROBABILITY, atol=TOLERANCE)
    np.testing.assert_allclose(final_scores(probability, head_weights(DOMAIN.ranker["home"], {})), SCORES, atol=TOLERANCE)
