//! `tokenizer.json` from the vocabulary inside a GGUF file.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    decoders::byte_level::ByteLevel as ByteLevelDecoder,
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::gguf::{Gguf, Value};

type Result<T> = std::result::Result<T, String>;

/// `llama_token_type` of tokens that are matched in text before everything else.
const CONTROL: u32 = 3;
const USER_DEFINED: u32 = 4;

/// Splits words, numbers of up to three digits and punctuation as Llama 3 does.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Builds the tokenizer and returns it as compact JSON.
///
/// # Errors
/// For tokenizers that are no byte-level BPE, for unknown ways of splitting text into words, and for
/// merges that the vocabulary does not explain.
pub(super) fn to_json(gguf: &Gguf<'_>) -> Result<Vec<u8>> {
    let kind = gguf.string("tokenizer.ggml.model")?.unwrap_or("none");
    if kind != "gpt2" {
        return Err(format!(
            "has a tokenizer of kind {kind:?}; only byte-level BPE (\"gpt2\") can be taken from a \
             GGUF file, use the model's safetensors folder with its tokenizer.json"
        ));
    }
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let pre = gguf.string("tokenizer.ggml.pre")?.unwrap_or("default");
    let mut tokenizer = Tokenizer::new(model(gguf, tokens, pre)?);
    tokenizer
        .with_pre_tokenizer(Some(pre_tokenizer(pre)?))
        .with_decoder(Some(ByteLevelDecoder::default()));
    tokenizer.add_tokens(added_tokens(gguf, tokens)?).map_err(|error| error.to_string())?;
    tokenizer.to_string(false).map(String::into_bytes).map_err(|error| error.to_string())
}

/// Vocabulary and merges.
fn model(gguf: &Gguf<'_>, tokens: &[&str], pre: &str) -> Result<BPE> {
    let vocab: HashMap<&str, u32> = tokens.iter().copied().zip(0..).collect();
    if vocab.len() != tokens.len() {
        return Err("has the same token twice in its vocabulary".into());
    }
    let mut joined = String::new();
    let mut merges = Vec::new();
    for (rank, merge) in gguf.strings("tokenizer.ggml.merges")?.iter().enumerate() {
        // The `tokenizers` library panics on some merges whose result is no token, so check here.
        let (left, right) = merge
            .split_once(' ')
            .filter(|(left, right)| {
                joined.clear();
                joined.extend([*left, *right]);
                [left, right, joined.as_str()].iter().all(|token| vocab.contains_key(token))
            })
            .ok_or_else(|| format!("has merge {rank} that is no pair of its tokens"))?;
        merges.push((left.to_owned(), right.to_owned()));
    }
    let vocab: Vocab = vocab.into_iter().map(|(token, id)| (token.to_owned(), id)).collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre == "llama-bpe")
        .build()
        .map_err(|error| error.to_string())
}

/// How text is cut into words before merging, by llama.cpp's name for it.
fn pre_tokenizer(pre: &str) -> Result<PreTokenizerWrapper> {
    let gpt2 = ByteLevel::new(false, true, true);
    Ok(match pre {
        "gpt-2" | "default" => gpt2.into(),
        "smollm" | "starcoder" => Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(),
        "llama-bpe" => {
            let split = Split::new(
                SplitPattern::Regex(LLAMA3.into()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|error| error.to_string())?;
            Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into()
        }
        _ => {
            return Err(format!(
                "splits text in an unknown way, {pre:?} (known: default, gpt-2, llama-bpe, smollm, \
                 starcoder); use the model's safetensors folder with its tokenizer.json"
            ));
        }
    })
}

/// Tokens that are matched as a whole wherever they stand in a text.
fn added_tokens(gguf: &Gguf<'_>, tokens: &[&str]) -> Result<Vec<AddedToken>> {
    let Some(Value::Integers(kinds)) = gguf.metadata.get("tokenizer.ggml.token_type") else {
        return Err("has no array of integers tokenizer.ggml.token_type".into());
    };
    if kinds.len() != tokens.len() {
        return Err(format!("has {} tokens but {} token types", tokens.len(), kinds.len()));
    }
    let added = tokens.iter().zip(kinds).filter_map(|(&token, &kind)| match kind {
        CONTROL => Some(AddedToken::from(token, true)),
        USER_DEFINED => Some(AddedToken::from(token, false).normalized(false)),
        _ => None,
    });
    Ok(added.collect())
}
