"""What models are stored in besides plain safetensors: adapters, GGUF files, few bits."""
