//! Times the native engine's pass: `forward DETECTOR_FOLDER [ISA] [THREADS] [CALLERS] [TOKENS,…]`.
//!
//! Prints the time to load, then for several lengths the least and the median time of a pass up to
//! layer 14, and with more than one caller the tokens per second of all of them together.
#![expect(clippy::print_stdout, clippy::disallowed_methods, reason = "prints what it has timed")]

use std::{
    error::Error,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use alknet_core::model::{
    Backend, LlamaConfig, Sequence, Sink, TokenId, native::NativeBackend, weights::Weights,
};

/// Takes activations and forgets them.
struct Discard;

impl Sink for Discard {
    fn rows(&self, _: usize, _: usize, _: usize, _: &[f32]) -> alknet_core::Result<()> {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("usage: forward DETECTOR_FOLDER [ISA] [THREADS] [CALLERS] [TOKENS,…]")?;
    let isa = arguments.next().map(|name| name.parse()).transpose()?;
    let threads = arguments.next().map(|number| number.parse()).transpose()?;
    let callers: usize = arguments.next().map_or(Ok(1), |number| number.parse())?;
    let lengths = arguments.next().unwrap_or_else(|| "1,16,64,128,512,2048".into());
    let lengths: Vec<u32> = lengths.split(',').map(str::parse).collect::<Result<_, _>>()?;

    let start = Instant::now();
    let folder = Path::new(&folder);
    let config = LlamaConfig::from_file(&folder.join("config.json"))?;
    let weights = Arc::new(Weights::open(&folder.join("model.safetensors"))?);
    let sites = ["6.resid_post".parse()?, "14.resid_post".parse()?];
    let backend = NativeBackend::load(weights, &config, &sites, threads, isa)?;
    println!("{}, loaded in {:.1} ms", backend.name(), 1e3 * start.elapsed().as_secs_f64());

    for len in lengths {
        let vocabulary = config.vocab_size as TokenId;
        let input_ids: Vec<_> = (0..len).map(|i| (i * 7919 + 13) % vocabulary).collect();
        if callers == 1 {
            let mut times = repeat(&backend, &input_ids)?;
            times.sort();
            let ms = |time: Duration| 1e3 * time.as_secs_f64();
            let (least, median) = (ms(times[0]), ms(times[times.len() / 2]));
            println!("{len:5} tokens: {least:8.2} ms at least, {median:8.2} ms median");
        } else {
            let start = Instant::now();
            let passes: usize = std::thread::scope(|scope| {
                let run = || scope.spawn(|| repeat(&backend, &input_ids).map_or(0, |t| t.len()));
                let callers: Vec<_> = (0..callers).map(|_| run()).collect();
                callers.into_iter().map(|caller| caller.join().unwrap_or(0)).sum()
            });
            let rate = passes as f64 * f64::from(len) / start.elapsed().as_secs_f64();
            println!("{len:5} tokens: {rate:8.0} tokens/s, {callers} callers");
        }
    }
    Ok(())
}

/// Times of passes over the same tokens, for some two seconds.
fn repeat(backend: &NativeBackend, input_ids: &[TokenId]) -> alknet_core::Result<Vec<Duration>> {
    let (begin, mut times) = (Instant::now(), Vec::new());
    while times.len() < 5 || begin.elapsed() < Duration::from_secs(2) {
        let start = Instant::now();
        let mut cache = backend.new_cache();
        backend.forward(&mut [Sequence::new(input_ids, &mut cache)], &Discard)?;
        times.push(start.elapsed());
    }
    Ok(times)
}
