"""Forwards that the layer knows, by the fingerprint of their source (`patch_match.fingerprint`). Data only.

Taken from transformers 5.23; the classes named were found to have that text. `python -m trebuchet.kernels.patch_match
CLASS` prints the fingerprint of a class, given as module.Class.
"""

KNOWN: dict[str, str] = {
    # Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Phi-3, SmolLM3, Granite
    "075c8d1982795b4a": "rms_norm",
    # OLMo 2: the weight before the rounding
    "2c29d28177dec537": "rms_norm_late_cast",
    # Gemma 1 to 3
    "1c76716023223f6e": "rms_norm_plus_one",
    # Llama (and SmolLM2), Gemma, Granite
    "5824b452b403bed8": "attention",
    # Mistral, Mixtral
    "b54604763efda274": "attention_config_window",
    # Qwen2
    "1edd867e32ce92b1": "attention_module_window",
    # Qwen3, Qwen3-MoE: norm, then transpose; Gemma 3: transpose, then norm
    "e6255c63d1da9829": "attention_qk_norm",
    "c62bc62c018d8ede": "attention_qk_norm",
    # Gemma 2
    "405c5ef2effa27dc": "attention_softcap",
    # Phi-3
    "2a6e0cf3224956ee": "attention_packed",
    # SmolLM3: some layers without rotation
    "5d2b261fda786a65": "attention_optional_rope",
    # Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, SmolLM3, Granite, OLMo 2, Cohere, the dense layers of Qwen3-MoE
    "d9e9fc4111026fc2": "mlp",
    # Phi-3
    "cc9ee1739c1f26d2": "mlp_packed",
    # Llama, Mistral, Qwen2, Qwen3, Gemma, SmolLM3, Qwen3-MoE; Mixtral
    "22eed1f58c7ab73a": "block",
    "06673bd5ddb635ad": "block",
    # Gemma 2 and 3
    "2f03e30c4cc8676c": "block_sandwich",
    # Phi-3
    "e526e5cac413fa76": "block_dropout",
    # Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3, SmolLM3, OLMo 2
    "c802b1c37c3b3e9a": "causal_lm",
    # Gemma 2 and 3 (text)
    "9e9a079c50cadc74": "causal_lm_softcap",
    # Cohere
    "19c4dee933daefaf": "causal_lm_multiply",
    # Granite
    "37eb8c1a4d444e41": "causal_lm_divide",
    # Mixtral, Qwen3-MoE
    "da0542668b01d52c": "causal_lm_router",
}
