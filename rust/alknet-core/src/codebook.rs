//! Codebook: the compiled detector parameters on disk, one safetensors file, read and checked.
//!
//! | tensor | shape | meaning |
//! |---|---|---|
//! | `mean` | `[n_sites · hidden_size]` | μ |
//! | `components` | `[n_components, n_sites · hidden_size]` | C, whitening folded in |
//! | `cdf_knots`, `cdf_values` | `[n_components, n_knots]` | distribution of each windowed projection in benign text |
//! | `direction_weights` | `[n_scales (+ 1), n_directions, n_components]` | logistic models on windowed projections: of each scale, the run with the largest mean counts; where something closes texts, on that last |
//! | `closing` | `[n_blocks, hidden_size]` | what closes a text, where it was learned: see [`Probe::Learned`] |
//! | `direction_bias` | `[n_directions]` | their constants |
//! | `null_knots`, `null_values` | `[n_origins, n_length_classes, n_knots]` | −log₁₀ share of benign texts whose statistic is at least the knot |
//! | `novelty_knots`, `novelty_values` | `[n_length_classes, n_knots]` | the same for novelty |
//!
//! A codebook may have a first stage that reads the first of its sites alone (see [`crate::cascade`]): all of these but
//! `closing` once more, their names after `early.`, for so many sites.
//!
//! Metadata are strings; see [`Codebook::from_bytes`]. A file is hostile until checked: its size is
//! limited before it is read, every shape is compared with the others, every number must be finite
//! and every spline monotone.

use std::{collections::HashMap, path::Path};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::{
    error::{Error, Result},
    model::{Probe, Site, TokenId, check_sites, config::read_at_most},
    spline::MonotoneSpline,
    window::Closing,
};

/// Largest codebook file that is read, in bytes. The shipped one has 138 kB.
pub const MAX_BYTES: u64 = 64 << 20;

const FORMAT_VERSION: &str = "4";
const MAX_COMPONENTS: usize = 1024;
const MAX_DIRECTIONS: usize = 256;
const MAX_SCALES: usize = 16;
const MAX_KNOTS: usize = 1024;
const MAX_TOKENS: usize = 1 << 20;

/// Who wrote a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A prompt: orders to the model are ordinary in it.
    User,
    /// Something fetched (document, tool result, e-mail, page): orders to the model are not.
    Document,
}

impl Origin {
    /// `user` or `document`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Document => "document",
        }
    }
}

/// A named behaviour: logistic model on the windowed projections.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectionInfo {
    /// Behaviour, such as `instruction_override`.
    pub name: String,
    /// The origin it is read for; all by default.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// Whether it takes part in the score; the others only explain.
    pub scored: bool,
}

impl DirectionInfo {
    /// Whether it is read in a text of this origin; of an unknown one, everything is.
    pub fn is_read(&self, origin: Option<Origin>) -> bool {
        self.origin.is_none() || origin.is_none() || self.origin == origin
    }
}

/// What a codebook was compiled for; all of it must match the loaded detector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// sha256 of `model.safetensors`, lower-case hex.
    pub weights_sha256: String,
    /// sha256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// sha256 of `config.json`.
    pub config_sha256: String,
}

/// The first stage of a codebook.
#[derive(Debug, Clone)]
pub struct Early {
    /// Reads the first sites as the whole one reads all.
    pub codebook: Box<Codebook>,
    /// p-value above which a piece is not read any further.
    pub above: f64,
}

/// A checked codebook.
#[derive(Debug, Clone)]
pub struct Codebook {
    /// Name of the detector it belongs to.
    pub detector: String,
    /// What it was compiled for.
    pub fingerprint: Fingerprint,
    /// Where activations are read, in the order of the columns of `components`.
    pub sites: Vec<Site>,
    /// Width of one activation row.
    pub hidden_size: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens between the starts of windows.
    pub stride: usize,
    /// Windows of a run, rising; runs of the last are the frames that are judged.
    pub scales: Vec<usize>,
    /// Most tokens read in one piece; longer texts are read in overlapping segments.
    pub segment_tokens: usize,
    /// Tokens that neighbouring segments share.
    pub segment_overlap: usize,
    /// Upper bounds (inclusive, in tokens) of the length classes; the last also serves longer texts.
    pub length_classes: Vec<usize>,
    /// Origins that have a null of their own; `None`, for texts whose origin is unknown, always has.
    pub origins: Vec<Option<Origin>>,
    /// What is read after every so many tokens of a piece, and counts besides the windows.
    pub closing: Option<Closing>,
    /// One per row of `direction_weights`.
    pub directions: Vec<DirectionInfo>,
    /// What says of most texts that they are ordinary before all of the sites have been read.
    pub early: Option<Early>,
    /// Every metadata entry of the file, for `inspect`.
    pub metadata: HashMap<String, String>,
    mean: Vec<f32>,
    components: Vec<Vec<f32>>,
    n_components: usize,
    direction_weights: Vec<f32>,
    direction_bias: Vec<f32>,
    cdfs: Vec<MonotoneSpline>,
    nulls: Vec<MonotoneSpline>,
    novelty: Vec<MonotoneSpline>,
}

impl Codebook {
    /// Reads and checks a codebook file.
    ///
    /// # Errors
    /// [`Error::Codebook`] saying what is wrong.
    pub fn from_file(path: &Path) -> Result<Self> {
        let unreadable =
            |error| Error::Codebook(format!("{} cannot be read: {error}", path.display()));
        Self::from_bytes(&read_at_most(path, MAX_BYTES).map_err(unreadable)?)
    }

    /// Checks the bytes of a codebook file.
    ///
    /// Metadata: `format_version` (4), `detector`, `weights_sha256`, `tokenizer_sha256`,
    /// `config_sha256`, `sites` (comma-separated), `hidden_size`, `window`, `stride`, `scales` (JSON list),
    /// `segment_tokens`, `segment_overlap`, `length_classes` (JSON list), `origins` (JSON list
    /// of `"user"`, `"document"` and `null`), `directions` (JSON list of [`DirectionInfo`]) and, if there
    /// is one, `closing` (JSON of `every` and, unless there is a tensor of this name, `token`; see [`Closing`]) and
    /// `early` (JSON of the number of `sites` of the first stage and the p-value `above` which it ends the reading).
    /// Further entries are kept and not interpreted.
    ///
    /// # Errors
    /// [`Error::Codebook`] saying what was found and what was expected.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).map_err(Error::Codebook)
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes)
            .map_err(|error| format!("not a safetensors file: {error}"))?;
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| format!("not a safetensors file: {error}"))?;
        let metadata = Metadata(header.metadata().clone().unwrap_or_default());
        let version = metadata.text("format_version")?;
        if version != FORMAT_VERSION {
            return Err(format!(
                "format_version is {version:?}; this library reads {FORMAT_VERSION:?}: compile it again or use the library it was made with"
            ));
        }
        let tensors = |prefix| Tensors { file: &file, prefix };
        let mut codebook = Self::stage(&metadata, &tensors(""), None)?;
        if let Some(EarlyEntry { sites, above }) = metadata.early()? {
            check_early(&codebook.sites, sites, above)?;
            let early = Self::stage(&metadata, &tensors("early."), Some(sites))?;
            codebook.early = Some(Early { codebook: Box::new(early), above });
        }
        codebook.metadata = metadata.0;
        Ok(codebook)
    }

    /// The stage whose tensors these are, which reads the first `n_sites` sites, or all.
    fn stage(
        metadata: &Metadata,
        tensors: &Tensors<'_>,
        n_sites: Option<usize>,
    ) -> std::result::Result<Self, String> {
        let mut sites = metadata.sites()?;
        let hidden_size = metadata.number("hidden_size", 1, 1 << 16)?;
        let n_blocks = sites.iter().map(|site| site.layer + 1).max().unwrap_or(0);
        sites.truncate(n_sites.unwrap_or(sites.len()));
        let window = metadata.number("window", 1, 4096)?;
        let stride = metadata.number("stride", 1, window)?;
        let scales: Vec<usize> = metadata.json("scales")?;
        let segment_tokens = metadata.number("segment_tokens", window, MAX_TOKENS)?;
        let segment_overlap = metadata.number("segment_overlap", 0, segment_tokens - 1)?;
        let length_classes: Vec<usize> = metadata.json("length_classes")?;
        let origins: Vec<Option<Origin>> = metadata.json("origins")?;
        let directions: Vec<DirectionInfo> = metadata.json("directions")?;
        check_rising("scales", &scales, MAX_SCALES)?;
        check_rising("length_classes", &length_classes, 64)?;
        check_lists(&origins, &directions)?;
        let closing = tensors.closing(metadata, &[n_blocks, hidden_size])?;
        closing.as_ref().map_or(Ok(()), |closing| closing.check(window))?;
        let readings = scales.len() + usize::from(closing.is_some());

        let columns = sites.len() * hidden_size;
        let n_components = tensors.rows("components", MAX_COMPONENTS)?;
        let components = tensors.read("components", &[n_components, columns])?;
        let cdf_shape = [n_components, tensors.columns("cdf_knots", MAX_KNOTS)?];
        let null_shape =
            [origins.len(), length_classes.len(), tensors.columns("null_knots", MAX_KNOTS)?];
        let novelty_shape = [length_classes.len(), tensors.columns("novelty_knots", MAX_KNOTS)?];
        Ok(Self {
            detector: metadata.text("detector")?.to_owned(),
            fingerprint: Fingerprint {
                weights_sha256: metadata.text("weights_sha256")?.to_owned(),
                tokenizer_sha256: metadata.text("tokenizer_sha256")?.to_owned(),
                config_sha256: metadata.text("config_sha256")?.to_owned(),
            },
            mean: tensors.read("mean", &[columns])?,
            components: by_site(&components, sites.len(), hidden_size),
            n_components,
            direction_weights: tensors
                .read("direction_weights", &[readings, directions.len(), n_components])?,
            closing,
            direction_bias: tensors.read("direction_bias", &[directions.len()])?,
            cdfs: tensors.cdfs("cdf", &cdf_shape)?,
            nulls: tensors.nulls("null", &null_shape)?,
            novelty: tensors.nulls("novelty", &novelty_shape)?,
            early: None,
            sites,
            hidden_size,
            window,
            stride,
            scales,
            segment_tokens,
            segment_overlap,
            length_classes,
            origins,
            directions,
            metadata: HashMap::new(),
        })
    }

    /// Refuses a codebook that was compiled for other files than the loaded ones.
    ///
    /// # Errors
    /// [`Error::Codebook`] with both hashes.
    pub fn check(&self, loaded: &Fingerprint) -> Result<()> {
        let pairs = [
            ("model.safetensors", &self.fingerprint.weights_sha256, &loaded.weights_sha256),
            ("tokenizer.json", &self.fingerprint.tokenizer_sha256, &loaded.tokenizer_sha256),
            ("config.json", &self.fingerprint.config_sha256, &loaded.config_sha256),
        ];
        for (file, made_for, found) in pairs {
            if made_for != found {
                return Err(Error::Codebook(format!(
                    "compiled for {file} with sha256 {made_for}, but the loaded one has {found}: \
                     use the detector it belongs to, or compile a codebook for this one with `alknet-firewall calibrate`"
                )));
            }
        }
        Ok(())
    }

    /// Rows of the projection.
    pub fn n_components(&self) -> usize {
        self.n_components
    }

    /// `μ_s`, `[hidden_size]`, and `C_s`, `[n_components, hidden_size]`, of the site with this index.
    pub fn site(&self, site: usize) -> (&[f32], &[f32]) {
        let hidden = self.hidden_size;
        (&self.mean[site * hidden..(site + 1) * hidden], &self.components[site])
    }

    /// What mean projections `z`, `[n_components]`, add to the log-odds of every direction, as those of
    /// runs of every scale and as that of what closes the text: `[n_scales (+ 1), n_directions]`.
    pub fn terms(&self, z: &[f32]) -> Vec<f64> {
        let dot = |weights: &[f32]| -> f64 {
            weights.iter().zip(z).map(|(w, z)| f64::from(*w) * f64::from(*z)).sum()
        };
        self.direction_weights.chunks_exact(self.n_components).map(dot).collect()
    }

    /// Constant of the log-odds of direction `d`.
    pub fn bias(&self, d: usize) -> f64 {
        f64::from(self.direction_bias[d])
    }

    /// Share of benign windows whose projection on component `k` is below `z`.
    pub fn cdf(&self, k: usize, z: f32) -> f64 {
        self.cdfs[k].eval_cdf(f64::from(z))
    }

    /// Length class of a text of `n_tokens` tokens.
    pub fn length_class(&self, n_tokens: usize) -> usize {
        let last = self.length_classes.len() - 1;
        self.length_classes.iter().position(|&bound| n_tokens <= bound).unwrap_or(last)
    }

    /// Index into `origins` of the null that judges texts of this origin.
    pub fn reading(&self, origin: Option<Origin>) -> usize {
        let position = |wanted| self.origins.iter().position(|&o| o == wanted);
        position(origin).or_else(|| position(None)).unwrap_or(0)
    }

    /// Null of the score of `origin` (an index into `origins`) in a length class: statistic to −log₁₀ p.
    pub fn null(&self, origin: usize, class: usize) -> &MonotoneSpline {
        &self.nulls[origin * self.length_classes.len() + class]
    }

    /// Null of the novelty in a length class: statistic to −log₁₀ p.
    pub fn novelty_null(&self, class: usize) -> &MonotoneSpline {
        &self.novelty[class]
    }
}

/// Checks a list of sizes.
fn check_rising(name: &str, sizes: &[usize], most: usize) -> std::result::Result<(), String> {
    let rising = sizes.windows(2).all(|w| w[0] < w[1]);
    if (1..=most).contains(&sizes.len()) && sizes[0] > 0 && rising {
        return Ok(());
    }
    Err(format!("{name} {sizes:?} are not 1 to {most} increasing numbers above 0"))
}

/// Checks the lists of the metadata against each other.
fn check_lists(
    origins: &[Option<Origin>],
    directions: &[DirectionInfo],
) -> std::result::Result<(), String> {
    let repeated = (1..origins.len()).any(|i| origins[..i].contains(&origins[i]));
    if repeated || !origins.contains(&None) {
        return Err(format!(
            "origins {origins:?} are not different ones with the unknown among them"
        ));
    }
    if directions.is_empty() || directions.len() > MAX_DIRECTIONS {
        return Err(format!("{} directions; 1 to {MAX_DIRECTIONS} are read", directions.len()));
    }
    for &origin in origins {
        if !directions.iter().any(|d| d.scored && d.is_read(origin)) {
            return Err(format!("no scored direction for origin {origin:?}"));
        }
    }
    Ok(())
}

/// The entry of the metadata.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EarlyEntry {
    sites: usize,
    above: f64,
}

/// Checks what a first stage reads of these sites: an engine has to come by its own before the others.
fn check_early(sites: &[Site], n_sites: usize, above: f64) -> std::result::Result<(), String> {
    if !(1..sites.len()).contains(&n_sites) {
        return Err(format!("early reads {n_sites} of {} sites; 1 to all but one", sites.len()));
    }
    let (first, later) = sites.split_at(n_sites);
    if first.iter().any(|site| later.iter().any(|other| other.layer <= site.layer)) {
        return Err("early reads a site that is not before the others".into());
    }
    if !(above > 0.0 && above < 1.0) {
        return Err(format!(
            "early ends the reading above p = {above}, which is not within (0, 1)"
        ));
    }
    Ok(())
}

/// Splits the columns of `components` into one contiguous matrix per site.
fn by_site(components: &[f32], n_sites: usize, hidden: usize) -> Vec<Vec<f32>> {
    let rows = || components.chunks_exact(n_sites * hidden);
    let site =
        |s: usize| rows().flat_map(|row| &row[s * hidden..(s + 1) * hidden]).copied().collect();
    (0..n_sites).map(site).collect()
}

/// String metadata with typed access.
struct Metadata(HashMap<String, String>);

impl Metadata {
    fn text(&self, key: &str) -> std::result::Result<&str, String> {
        self.0.get(key).map(String::as_str).ok_or_else(|| format!("metadata has no {key:?}"))
    }

    fn number(&self, key: &str, min: usize, max: usize) -> std::result::Result<usize, String> {
        let text = self.text(key)?;
        match text.parse() {
            Ok(n) if (min..=max).contains(&n) => Ok(n),
            _ => Err(format!("metadata {key:?} is {text:?}, not a number from {min} to {max}")),
        }
    }

    fn sites(&self) -> std::result::Result<Vec<Site>, String> {
        let sites = self.text("sites")?.split(',');
        let sites: Vec<Site> = sites
            .map(|site| site.parse().map_err(|error: Error| error.to_string()))
            .collect::<std::result::Result<_, _>>()?;
        check_sites(&sites).map_err(|error| error.to_string())?;
        Ok(sites)
    }

    fn early(&self) -> std::result::Result<Option<EarlyEntry>, String> {
        self.0.contains_key("early").then(|| self.json("early")).transpose()
    }

    fn json<T: serde::de::DeserializeOwned>(&self, key: &str) -> std::result::Result<T, String> {
        serde_json::from_str(self.text(key)?)
            .map_err(|error| format!("metadata {key:?} is not what it should be: {error}"))
    }
}

/// Tensors of a stage with checked access.
struct Tensors<'a> {
    file: &'a SafeTensors<'a>,
    /// What their names begin with.
    prefix: &'static str,
}

impl Tensors<'_> {
    fn view(&self, name: &str) -> std::result::Result<safetensors::tensor::TensorView<'_>, String> {
        let name = format!("{}{name}", self.prefix);
        self.file.tensor(&name).map_err(|_| format!("no tensor {name:?}"))
    }

    fn rows(&self, name: &str, max: usize) -> std::result::Result<usize, String> {
        self.dimension(name, 0, max)
    }

    fn columns(&self, name: &str, max: usize) -> std::result::Result<usize, String> {
        let dims = self.view(name)?.shape().len();
        self.dimension(name, dims.saturating_sub(1), max)
    }

    fn dimension(&self, name: &str, axis: usize, max: usize) -> std::result::Result<usize, String> {
        let view = self.view(name)?;
        match view.shape().get(axis) {
            Some(&n) if (1..=max).contains(&n) => Ok(n),
            _ => {
                Err(format!("{name:?} has shape {:?}; axis {axis} may be 1 to {max}", view.shape()))
            }
        }
    }

    /// Finite fp32 numbers of the tensor `name`, which must have this shape.
    fn read(&self, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, String> {
        let view = self.view(name)?;
        if view.dtype() != Dtype::F32 || view.shape() != shape {
            return Err(format!(
                "{name:?} is {:?} {:?}, expected F32 {shape:?}",
                view.dtype(),
                view.shape()
            ));
        }
        let numbers =
            view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let numbers: Vec<f32> = numbers.collect();
        match numbers.iter().position(|x| !x.is_finite()) {
            Some(i) => Err(format!("{name:?} holds {} at index {i}", numbers[i])),
            None => Ok(numbers),
        }
    }

    /// What closes a text, if anything does: a token, or vectors of this shape.
    fn closing(
        &self,
        metadata: &Metadata,
        shape: &[usize],
    ) -> std::result::Result<Option<Closing>, String> {
        /// The entry of the metadata.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Entry {
            every: usize,
            token: Option<TokenId>,
        }

        if !metadata.0.contains_key("closing") {
            return Ok(None);
        }
        let entry: Option<Entry> = metadata.json("closing")?;
        let Some(Entry { every, token }) = entry else { return Ok(None) };
        let probe = match token {
            Some(token) => Probe::Token(token),
            // Both stages read beside a text what runs through all blocks.
            None => Probe::Learned(Tensors { prefix: "", ..*self }.read("closing", shape)?),
        };
        Ok(Some(Closing { probes: vec![probe], every }))
    }

    /// One spline per row of `{name}_knots` and `{name}_values`.
    fn splines(
        &self,
        name: &str,
        shape: &[usize],
    ) -> std::result::Result<Vec<MonotoneSpline>, String> {
        let knots = self.read(&format!("{name}_knots"), shape)?;
        let values = self.read(&format!("{name}_values"), shape)?;
        let n = shape[shape.len() - 1];
        let wide = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect();
        let rows = knots.chunks_exact(n).zip(values.chunks_exact(n)).enumerate();
        rows.map(|(i, (x, y))| {
            MonotoneSpline::new(wide(x), wide(y))
                .map_err(|problem| format!("{name} {i}: {problem}"))
        })
        .collect()
    }

    /// Distribution functions: values within (0, 1) and rising at both ends, for the tails.
    fn cdfs(
        &self,
        name: &str,
        shape: &[usize],
    ) -> std::result::Result<Vec<MonotoneSpline>, String> {
        let splines = self.splines(name, shape)?;
        for (i, spline) in splines.iter().enumerate() {
            let (low, high) = spline.ends();
            if low.0 <= 0.0 || high.0 >= 1.0 || low.1 <= 0.0 || high.1 <= 0.0 {
                return Err(format!(
                    "{name} {i}: values must lie within (0, 1) and rise at both ends"
                ));
            }
        }
        Ok(splines)
    }

    /// Nulls: −log₁₀ p, not negative, and rising at the upper end so that the tail is exponential.
    fn nulls(
        &self,
        name: &str,
        shape: &[usize],
    ) -> std::result::Result<Vec<MonotoneSpline>, String> {
        let splines = self.splines(name, shape)?;
        for (i, spline) in splines.iter().enumerate() {
            let (low, high) = spline.ends();
            if low.0 < 0.0 || high.0 < 3.0 || high.1 <= 0.0 {
                return Err(format!(
                    "{name} {i}: −log10 p must start at 0 or above, reach 3 and rise at the end"
                ));
            }
        }
        Ok(splines)
    }
}
