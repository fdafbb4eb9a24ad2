"""All that llmprune knows of particular families of models, as data: names of matrices and of settings, a reason a row.

Blocks, matrices, stages and calls are discovered. What is here cannot be: which parts a name stands for is said neither by
a checkpoint nor by a module. `families` of a row are model types of transformers that need it, some of maybe many.
`tests/test_families_table.py` holds every row to be used by one of them, and the rest of the package to know no such name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a module or of a setting, or a pattern of names of tensors."""

    name: str
    families: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Coupling:
    """Matrices of one module that read the same inputs, and the one that reads what their rows make."""

    producers: tuple[str, ...]
    consumer: str
    families: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """What a module of fused experts calls its parameters.

    Attributes:
        first: the parameter that reads the hidden states.
        matrices: those of one expert that it holds, in order: gate and up, or one alone.
        last: the parameter that reads what they make, and its matrix.
    """

    first: str
    matrices: tuple[str, ...]
    last: str
    families: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Stricter:
    """A family whose configuration refuses numbers of heads that do not divide the width, and one that computes the same.

    Attributes:
        title: what users call it.
        equal: the model type of the other.
        biases: settings that the other lacks; where one is on, the two differ.
        settings: what the other needs besides.
    """

    model_type: str
    title: str
    equal: str
    biases: tuple[str, ...]
    settings: tuple[tuple[str, None], ...]
    families: tuple[str, ...]
    why: str


# The first that fits a module is taken, so the gated ones come first.
FEED_FORWARD = (
    Coupling(
        ("gate_proj", "up_proj"),
        "down_proj",
        ("llama", "gemma2", "mixtral"),
        "the code between them is a product of two matrices' outputs, which no module says",
    ),
    Coupling(
        ("w1", "w3"),
        "w2",
        ("lfm2",),
        "as for gate and up, and the numbers do not follow the order in which they run",
    ),
    Coupling(
        ("up_proj",),
        "down_proj",
        ("mpt",),
        "equal sizes do not prove that one matrix reads what another makes, neuron by neuron",
    ),
    Coupling(
        ("fc1",),
        "fc2",
        ("opt", "phi"),
        "they stand among the block's other modules, with nothing that sets the pair apart",
    ),
    Coupling(
        ("c_fc",),
        "c_proj",
        ("gpt2", "starcoder2"),
        "gpt2's attention has a c_proj too, so the pair must be known by both names",
    ),
    Coupling(
        ("dense_h_to_4h",),
        "dense_4h_to_h",
        ("gpt_neox", "bloom", "falcon"),
        "the activation between them is a function, a module, or fused with the bias: no common sign but the names",
    ),
)
ATTENTION = (
    Coupling(
        ("q_proj", "k_proj", "v_proj"),
        "o_proj",
        ("llama", "gemma2", "mixtral"),
        "queries, keys and values may be of equal size, and which is which decides the rows of a head",
    ),
    Coupling(
        ("q_proj", "k_proj", "v_proj"),
        "out_proj",
        ("opt", "gptj", "gpt_neo"),
        "as above, under another name for the output",
    ),
    Coupling(
        ("q_proj", "k_proj", "v_proj"),
        "dense",
        ("phi",),
        "as above, under another name for the output",
    ),
)
EXPERTS = (
    FusedExperts(
        "gate_up_proj",
        ("gate_proj", "up_proj"),
        "down_proj",
        ("mixtral", "gpt_oss", "qwen3_moe"),
        "transformers' interface of fused experts has these names fixed and no attribute for them",
    ),
    FusedExperts(
        "up_proj",
        ("up_proj",),
        "down_proj",
        ("nemotron_h",),
        "the same interface, for experts without a gate",
    ),
)
ROUTERS = (
    Name("router", ("gpt_oss", "granitemoe", "llama4_text"), "what chooses experts may be a plain linear layer"),
    Name("gate", ("mixtral", "qwen2_moe"), "transformers' own class for it differs from family to family"),
    Name("shared_expert_gate", ("qwen2_moe", "qwen3_next"), "a plain linear layer, of one row, that scales an expert"),
)
EXPERTS_PER_TOKEN = (
    Name("num_experts_per_tok", ("mixtral", "qwen2_moe", "gpt_oss"), "only the router's code uses it"),
    Name("top_k_experts", ("gemma4_text",), "the same number under another name"),
)
QUERY_HEADS = Name("num_attention_heads", ("llama", "gpt2"), "a matrix of queries does not say into how many heads it falls")
VALUE_HEADS = Name("num_key_value_heads", ("llama", "mixtral"), "absent where every head has keys and values of its own")
HEAD_WIDTH = Name("head_dim", ("llama", "qwen3"), "absent where it is the model's width over the number of heads")
IMPLIED_WIDTH = Name("n_inner", ("gpt2",), "None where it is four times the model's width: then no setting has the number")
WIDTHS = (
    Name("moe_intermediate_size", ("qwen2_moe", "qwen3_moe"), "the number alone may stand for something else"),
    Name("intermediate_size", ("llama", "mixtral", "gpt_neox"), "the number alone may stand for something else"),
    Name("ffn_dim", ("opt",), "the number alone may stand for something else"),
    IMPLIED_WIDTH,
    Name("ffn_hidden_size", ("falcon",), "the number alone may stand for something else"),
)
LAYER_LISTS = (
    Name("layer_types", ("gemma3_text", "qwen3"), "a list of as many entries as there are layers may be of something else"),
    Name("no_rope_layers", ("smollm3",), "a list of as many entries as there are layers may be of something else"),
)
STRICTER = (
    Stricter(
        "llama",
        "a Llama",
        "mistral",
        ("attention_bias", "mlp_bias"),
        (("sliding_window", None),),
        ("llama",),
        "that two families compute the same is known from their code",
    ),
)
LEFT_OVER = (
    Name(
        r"rotary_emb\.inv_freq$", ("llama",), "old checkpoints hold this buffer, layer by layer; transformers ignore it by name"
    ),
)
