//! Which instruction sets this CPU has.

use std::{fmt, str::FromStr};

/// An instruction set that has kernels of its own; each needs a CPU that has those before it, but
/// AVX-VNNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable code, as wide as the compiler's baseline for the target.
    Scalar,
    /// AVX2 and FMA.
    Avx2,
    /// AVX2 and FMA with VNNI as well, for products.
    AvxVnni,
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
    /// AVX-512 with BF16 as well, for attention.
    Avx512Bf16,
    /// AVX-512 with BF16, and AMX with tiles of bytes and of bf16 numbers.
    Amx,
}

impl Isa {
    /// All instruction sets, in ascending order of what they need.
    pub const ALL: [Self; 6] =
        [Self::Scalar, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// Whether this CPU and operating system can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && crate::amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The fastest one that this CPU can run.
    pub fn best() -> Self {
        Self::available().filter(|isa| isa.is_fast()).last().unwrap_or(Self::Scalar)
    }

    /// Whether this CPU gains by it over those before it.
    ///
    /// Intel's CPUs run `vdpbf16ps` at less than half the rate of AMD's: fewer products than by fp32 instructions.
    fn is_fast(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self == Self::Avx512Bf16 {
            return !is_intel();
        }
        true
    }

    /// Those that this CPU can run, in the order of [`Isa::ALL`].
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Name as in [`Isa::from_str`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }
}

/// Whether Intel made this CPU.
#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    // SAFETY: every CPU of this architecture has the instruction, and leaf 0.
    #[allow(unused_unsafe, reason = "asking is unsafe in older compilers")]
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no instruction set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownIsa(pub String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "instruction set {:?} is unknown; known are", self.0)?;
        Isa::ALL.iter().try_for_each(|isa| write!(f, " {isa}"))
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}

/// An instruction set was asked for that this CPU lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedIsa(pub Isa);

impl fmt::Display for UnsupportedIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this CPU cannot run {}; the fastest it can run is {}", self.0, Isa::best())
    }
}

impl std::error::Error for UnsupportedIsa {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        assert_eq!("sse9".parse::<Isa>(), Err(UnknownIsa("sse9".into())));
    }

    #[test]
    fn the_best_one_is_available() {
        assert!(Isa::best().is_available());
        if Isa::Amx.is_available() {
            assert_eq!(Isa::best(), Isa::Amx);
        } else if Isa::Avx512Bf16.is_available() {
            assert_eq!(Isa::best() == Isa::Avx512Bf16, Isa::Avx512Bf16.is_fast());
        }
    }
}
