"""A diffusion model on images: a denoiser of diffusers, and the noise that it learns to remove.

    x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε,    loss = mean (ε − ε̂(x_t, t, label))²      (arXiv 2006.11239, eq. 14)

diffusers is optional, and imported when the first model is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from sparsetrain.hf.model.diffusion_config import LABEL_KEYS, DiffusionConfig, label_key, num_labels
from sparsetrain.runs.folders import DIFFUSERS_WEIGHTS, WEIGHTS
from sparsetrain.runs.manifest import read_json, write_json
from sparsetrain.runs.mark import ENTRY

_KEPT = ("model_type", "architectures", "id2label", "label2id")


@dataclass
class Denoised(ModelOutput):
    """loss: the mean squared error. predicted, target: what the denoiser said and what it should, [b, c, h, w]."""

    loss: Tensor | None = None
    predicted: Tensor | None = None
    target: Tensor | None = None


class DiffusionModel(PreTrainedModel):
    """A denoiser whose forward adds the noise and returns the loss.

    Its modules are the denoiser's own under their own names, so that diffusers reads what is saved, and a method finds
    them where it would in the denoiser.
    """

    config_class = DiffusionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    config: Any
    signal_t: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        denoiser = _build(config)
        # one dict for both: whichever of them a module is exchanged in, the other has it too
        vars(self)["_modules"] = denoiser._modules
        vars(self)["_denoiser"] = denoiser
        self.register_buffer("signal_t", _signal(config), persistent=False)
        inside: Any
        for inside in self.modules():
            if type(inside).__name__ == "LabelEmbedding":  # each block would hide labels of its own
                inside.dropout_prob = 0.0

    @property
    def denoiser(self) -> Any:
        """The model of diffusers. It is no submodule: its modules are this model's."""
        return vars(self)["_denoiser"]

    @classmethod
    def from_config(cls, config: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
        """With random weights; what each block of a DiT adds, and its output, begin at zero (arXiv 2212.09748)."""
        if not isinstance(config, DiffusionConfig):
            raise ValueError(
                f"a model of the family {config.model_type} removes no noise. Use a denoiser of diffusers "
                f"({', '.join(LABEL_KEYS)}), such as dit-nano."
            )
        model: Any = cls(config)
        for name, module in model.named_modules():
            if name == "proj_out_2" or type(module).__name__ == "AdaLayerNormZero":
                last = module if isinstance(module, nn.Linear) else module.linear
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: Any,
        *_: Any,
        config: Any = None,
        dtype: torch.dtype | None = None,
        output_loading_info: bool = False,
        **__: Any,
    ) -> Any:
        """With the weights of a folder that this class or diffusers has saved.

        Raises:
            OSError: there are none.
        """
        folder = Path(folder)
        if config is None:
            from sparsetrain.hf.model.opening import open_config

            config = open_config(str(folder))
        path = next((folder / name for name in (WEIGHTS, DIFFUSERS_WEIGHTS) if (folder / name).is_file()), None)
        if path is None:
            raise OSError(f"{folder} holds no {WEIGHTS} or {DIFFUSERS_WEIGHTS}. Name a folder with weights.")
        model: Any = cls(config)
        found = load_file(str(path))
        own = model.state_dict()
        wrong = {key for key in own.keys() & found.keys() if own[key].shape != found[key].shape}
        model.load_state_dict({key: value for key, value in found.items() if key not in wrong}, strict=False)
        info = {
            "missing_keys": own.keys() - found.keys(),
            "unexpected_keys": found.keys() - own.keys(),
            "mismatched_keys": [(key, tuple(found[key].shape), tuple(own[key].shape)) for key in sorted(wrong)],
        }
        model = model.to(dtype or torch.float32).eval()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As any model of transformers; in the layout of diffusers, unless `save_original_format=False`."""
        super().save_pretrained(save_directory, *args, **options)
        folder = Path(save_directory)
        write_json(folder / "config.json", self._config_values() | _mark(folder))
        if options.get("save_original_format", True) and (folder / WEIGHTS).is_file():
            (folder / WEIGHTS).replace(folder / DIFFUSERS_WEIGHTS)

    def _config_values(self) -> dict[str, Any]:
        """The config as diffusers reads it, and the keys that are ours; diffusers takes none of transformers' own."""
        values = self.config.to_dict()
        values = {key: values[key] for key in (*DiffusionConfig.__annotations__, *_KEPT) if key in values}
        own = {key: value for key, value in self.denoiser.config.items() if not key.startswith("_")}
        about = {"_class_name": values["denoiser"], "_diffusers_version": _diffusers().__version__}
        return {**about, **values, **own}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute blocks in the backward pass, as diffusers does it: every one, from what stays on the device.

        Raises:
            ValueError: something else was asked for.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers}, offload={offload}: a diffusion model recomputes every block, from "
                "what stays on its device. Leave both out."
            )
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}

        def recompute(function: Any, *given: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *given, **options)  # type: ignore[attr-defined]

        self.denoiser.enable_gradient_checkpointing(recompute)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        timesteps: Tensor | None = None,
    ) -> Denoised:
        """Add noise, and say how far the denoiser is from it.

        Args:
            pixel_values: [b, c, h, w] in [-1, 1]. labels: [b]; None: no label.
            noise, timesteps: [b, c, h, w] and [b]; drawn if not given.
        """
        if noise is None:
            noise = torch.randn_like(pixel_values)
        if timesteps is None:
            timesteps = torch.randint(self.config.noise_steps, pixel_values.shape[:1], device=pixel_values.device)
        signal_b = self.signal_t[timesteps].to(pixel_values.dtype)[:, None, None, None]
        keep, add = signal_b.sqrt(), (1 - signal_b).sqrt()
        if self.training and labels is not None and self.config.label_dropout:
            hidden_b = torch.rand(labels.shape, device=labels.device) < self.config.label_dropout
            labels = labels.masked_fill(hidden_b, self.no_label or 0)
        noisy = (keep * pixel_values + add * noise).to(next(self.parameters()).dtype)
        predicted = self.denoise(noisy, timesteps, labels)
        v_prediction = self.config.prediction_type == "v_prediction"
        target = keep * noise - add * pixel_values if v_prediction else noise
        loss = F.mse_loss(predicted.float(), target.float())
        return Denoised(loss=loss, predicted=predicted, target=target)

    def denoise(self, noisy: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the denoiser says of noisy images [b, c, h, w]; labels [b], None: no label."""
        given: dict[str, Any] = {}
        if self.no_label is not None:
            none_b = torch.full_like(timesteps, self.no_label)
            given = {"class_labels": none_b if labels is None else labels}
        predicted = self.denoiser(noisy, timesteps, return_dict=False, **given)[0]
        return predicted[:, : noisy.shape[1]]  # a model that learns the variance says it in further channels

    @property
    def no_label(self) -> int | None:
        """The label that stands for none; None for a model that takes no labels."""
        labels = num_labels(self.config)
        return None if labels == 0 else labels

    def get_input_embeddings(self) -> Any:
        """It reads images."""
        raise NotImplementedError

    def get_output_embeddings(self) -> None:
        """It has no head."""
        return None


def _mark(folder: Path) -> dict[str, Any]:
    """What a converted model has noted in the config that was just written."""
    found = read_json(folder / "config.json")
    return {ENTRY: found[ENTRY]} if ENTRY in found else {}


def denoiser_of(model: Any) -> Any:
    """The model of diffusers inside a `DiffusionModel`; any other model itself."""
    return model.denoiser if isinstance(model, DiffusionModel) else model


def _build(config: DiffusionConfig) -> Any:
    """The denoiser of a config, with random weights.

    Raises:
        ValueError: diffusers is not installed, or the class is none that is known here.
    """
    label_key(config)  # no other class of diffusers is made
    kind = _class_of(config.denoiser)
    given = {key: getattr(config, key) for key in vars(config).keys() & _keys(kind)}
    if given.get("num_class_embeds") == 0:  # asked to take no labels
        given["num_class_embeds"] = None
    if "out_channels" in given and given["out_channels"] is None:
        given["out_channels"] = config.in_channels
    return kind(**given)


def _class_of(name: str) -> Any:
    found = getattr(_diffusers(), name, None)
    if found is not None:
        return found
    from sparsetrain.hf.model import uvit  # of diffusers' blocks, and ours

    return getattr(uvit, name)


def _keys(kind: Any) -> set[str]:
    import inspect

    return set(inspect.signature(kind.__init__).parameters) - {"self"}


def _signal(config: DiffusionConfig) -> Tensor:
    """ᾱ_t of each step."""
    scheduler = _diffusers().DDPMScheduler(num_train_timesteps=config.noise_steps, beta_schedule=config.noise_schedule)
    return scheduler.alphas_cumprod.float()


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "task=diffusion trains models of diffusers, which is not installed. Run: pip install "
            "'sparsetrain[diffusion]'"
        ) from None
    return diffusers
