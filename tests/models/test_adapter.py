"""The adapter against transformers' projector."""

import torch

from tests.models.parity import difference, gradient_differences, model_pair


def test_output_and_gradients_are_those_of_transformers(tmp_path, context):
    ours, theirs = model_pair(tmp_path, context)
    features_TFK = torch.randn(3, 16, ours.architecture.adapter_input_size, requires_grad=True)
    same_TFK = features_TFK.detach().clone().requires_grad_()
    got_TFH = ours.adapter(features_TFK)
    expected_TFH = theirs.model.multi_modal_projector(same_TFK)
    assert difference(got_TFH, expected_TFH) < 1e-5
    direction_TFH = torch.randn(got_TFH.shape)
    (got_TFH * direction_TFH).sum().backward()
    (expected_TFH * direction_TFH).sum().backward()
    assert difference(features_TFK.grad, same_TFK.grad) < 1e-5
    differences = gradient_differences(ours, theirs, ["adapter"])
    assert len(differences) == 6
    assert max(differences.values()) < 1e-5, differences
