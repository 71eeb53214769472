"""CLIP-TNseg: its image tower is CLIP's, whichever library holds the weights."""

import pytest
import torch

from bushpc.config import compose
from bushpc.errors import ConfigError, WeightsError
from bushpc.models.clip_tnseg import ClipTnseg, _load, build_clipseg, on_grid, vision_state

SMALL = ("model=clip_tnseg_small", "model.image_size=32")


def test_open_clips_weights_make_the_same_tokens_in_transformers_tower():
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(32, 8, 64, 3, 4, 4.0, output_dim=64, act_layer=QuickGELU).eval()
    vision, _ = build_clipseg(compose(SMALL).model)
    state = vision_state({f"visual.{name}": value for name, value in theirs.state_dict().items()})
    assert vision.load_state_dict(state, strict=False).missing_keys == []
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.forward_intermediates(image, indices=[2], intermediates_only=True, output_fmt="NLC")
        ours = _tokens(vision, image)
    torch.testing.assert_close(ours[:, 1:], expected["image_intermediates"][0], rtol=1e-4, atol=1e-5)


def _tokens(vision, image):
    x = vision.pre_layrnorm(vision.embeddings(image, interpolate_pos_encoding=False))
    for layer in vision.encoder.layers:
        x = layer(x, attention_mask=None)
    return x


def test_a_staged_file_is_loaded_at_another_grid_and_a_wrong_one_is_refused():
    from open_clip.transformer import QuickGELU, VisionTransformer

    theirs = VisionTransformer(32, 8, 64, 3, 4, 4.0, output_dim=64, act_layer=QuickGELU)
    state = {f"visual.{name}": value for name, value in theirs.state_dict().items()}
    vision, _ = build_clipseg(compose([*SMALL, "model.image_size=64"]).model)
    _load(vision, state)
    positions = vision.embeddings.position_embedding.weight
    assert positions.shape == (65, 64)
    torch.testing.assert_close(positions[0], state["visual.positional_embedding"][0])
    constant = torch.cat([torch.zeros(1, 2), torch.full((16, 2), 3.0)])
    torch.testing.assert_close(on_grid(constant, 65)[1:], torch.full((64, 2), 3.0))
    with pytest.raises(WeightsError, match="does not fit the model"):
        _load(vision, {name: value[..., :7] for name, value in state.items()})


def test_every_parameter_learns_and_the_sentence_matters(make_batch):
    model = ClipTnseg(compose(SMALL).model)
    model.train()(make_batch(32, 2)).total.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    with torch.no_grad():
        first, second = (
            model.eval().predict(make_batch(32, 2, conditions={"attribute_prompts": [text, text]})).prob_BKHW
            for text in ("irregular shape", "oval shape, circumscribed margin")
        )
    assert first.shape == (2, 1, 32, 32)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.image_size=40"], "not a multiple of 32, the U-Net's stride; the nearest is 32"),
        (["model.layers=[2,1]"], "in rising"),
        (["model.layers=[3]"], "from 0 to 2"),
        (["model.pretrained=true"], "loads CLIP's ViT-B/16"),
        (["model.groups=5"], "model.groups"),
    ],
)
def test_what_cannot_be_built_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(["model=clip_tnseg_small", *words])
