//! `tokenizer.json`, read without copies.
//!
//! The library's own reader takes 52 ms for SmolLM2's vocabulary, this one 20: tokens and merges are
//! borrowed from the file until the library takes them over. It also checks what the library takes on
//! trust.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper,
    models::bpe::{BPE, Vocab},
};

type Result<T> = std::result::Result<T, String>;

/// Words that a thread remembers the tokens of. A hostile text fills each with 8 KB: 8 MB per thread,
/// not the 80 MB of the library's default of 10,000 words.
const CACHED_WORDS: usize = 1024;

/// What matters of the file. Decoder and post-processor do not: nothing is decoded, nothing added.
#[derive(Deserialize)]
struct TokenizerFile<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedWithId>,
    #[serde(default)]
    normalizer: Option<NormalizerWrapper>,
    #[serde(default)]
    pre_tokenizer: Option<PreTokenizerWrapper>,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct AddedWithId {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// The field `model`. Kinds other than BPE have no merges or are named otherwise.
#[derive(Deserialize)]
struct Model<'a> {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(borrow)]
    vocab: Tokens<'a>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
}

/// Builds the tokenizer that `bytes` describe.
pub(super) fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let file: TokenizerFile<'_> =
        serde_json::from_slice(bytes).map_err(|error| format!("is no BPE tokenizer: {error}"))?;
    let mut tokenizer = tokenizers::Tokenizer::new(model(file.model)?);
    tokenizer.with_normalizer(file.normalizer).map_err(|error| error.to_string())?;
    tokenizer.with_pre_tokenizer(file.pre_tokenizer);
    let ids: Vec<(u32, String)> =
        file.added_tokens.iter().map(|added| (added.id, added.token.content.clone())).collect();
    tokenizer
        .add_tokens(file.added_tokens.into_iter().map(|added| added.token))
        .map_err(|error| error.to_string())?;
    for (id, content) in ids {
        let found = tokenizer.token_to_id(&content);
        if found != Some(id) {
            return Err(format!("gives added token {content:?} the id {id}, but it is {found:?}"));
        }
    }
    Ok(tokenizer)
}

/// Vocabulary and merges.
fn model(model: Model<'_>) -> Result<BPE> {
    if model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(format!("is a {:?} tokenizer; only BPE is supported", model.kind));
    }
    if model.dropout.is_some_and(|p| p != 0.0) || model.continuing_subword_prefix.is_some() {
        return Err("asks for dropout or a continuing_subword_prefix, which no Llama has".into());
    }
    let longest = model.vocab.0.iter().map(|(token, _)| token.len()).max().unwrap_or(0);
    // The library would panic on these; merges whose result is merely unknown it refuses itself.
    if let Some(rank) = model.merges.iter().position(|Merge(a, b)| a.len() + b.len() > longest) {
        return Err(format!("has merge {rank}, which is longer than every token"));
    }
    let mut vocab = Vocab::with_capacity(model.vocab.0.len());
    vocab.extend(model.vocab.0.into_iter().map(|(token, id)| (token.into_owned(), id)));
    let merges =
        model.merges.into_iter().map(|Merge(a, b)| (a.into_owned(), b.into_owned())).collect();
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .cache_capacity(CACHED_WORDS)
        .fuse_unk(model.fuse_unk)
        .byte_fallback(model.byte_fallback)
        .ignore_merges(model.ignore_merges);
    if let Some(token) = model.unk_token {
        builder = builder.unk_token(token);
    }
    if let Some(suffix) = model.end_of_word_suffix {
        builder = builder.end_of_word_suffix(suffix);
    }
    builder.build().map_err(|error| error.to_string())
}

/// A token or half a merge: borrowed unless the JSON spells it with escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// The vocabulary in the order of the file.
struct Tokens<'a>(Vec<(Cow<'a, str>, u32)>);

impl<'de: 'a, 'a> Deserialize<'de> for Tokens<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Tokens<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut tokens = Vec::new();
                while let Some((Text(token), id)) = map.next_entry()? {
                    tokens.push((token, id));
                }
                Ok(Tokens(tokens))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Two tokens that become one: `["a", "b"]`, in older files `"a b"`.
struct Merge<'a>(Cow<'a, str>, Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Merge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Merge<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("two tokens")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut next = || {
                    seq.next_element::<Text<'de>>()?
                        .ok_or_else(|| A::Error::invalid_length(1, &"two tokens"))
                };
                let (Text(left), Text(right)) = (next()?, next()?);
                Ok(Merge(left, right))
            }

            fn visit_str<E: serde::de::Error>(
                self,
                text: &str,
            ) -> std::result::Result<Self::Value, E> {
                let (left, right) =
                    text.split_once(' ').ok_or_else(|| E::custom("a merge without a space"))?;
                Ok(Merge(left.to_owned().into(), right.to_owned().into()))
            }
        }
        deserializer.deserialize_any(Either)
    }
}
