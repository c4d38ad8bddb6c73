//! Packs a GGUF file or a Hugging Face folder: `pack SOURCE OUT_DIR NUM_LAYERS`.

use std::{env, path::Path};

use alknet_core::pack::pack;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [source, out_dir, num_layers] = arguments.as_slice() else {
        return Err("usage: pack SOURCE OUT_DIR NUM_LAYERS".into());
    };
    pack(Path::new(source), Path::new(out_dir), num_layers.parse()?)?;
    Ok(())
}
