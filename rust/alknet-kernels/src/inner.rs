//! Inner products of fp32 numbers.
//!
//! Every instruction set runs the same code, without fused steps: the compiler writes it in wider
//! registers where the CPU has them, and the bits stay the same.

/// Numbers that are added up side by side.
const LANES: usize = 16;

/// Inner product in a fixed order of summation: sixteen lanes, then their sum.
///
/// # Shapes
/// - `a`, `b`: `[n]`
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut out = [0.0];
    dots(a, b, &mut out);
    out[0]
}

/// Inner products of `x` with every row, as [`dot`].
///
/// # Shapes
/// - `x`: `[n]`
/// - `rows`: `[out.len(), n]`
pub fn dots(x: &[f32], rows: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), x.len() * out.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has AVX-512.
        return unsafe { in_avx512(x, rows, out) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { in_avx2(x, rows, out) };
    }
    portable(x, rows, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn in_avx512(x: &[f32], rows: &[f32], out: &mut [f32]) {
    portable(x, rows, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn in_avx2(x: &[f32], rows: &[f32], out: &mut [f32]) {
    portable(x, rows, out);
}

#[inline(always)]
fn portable(x: &[f32], rows: &[f32], out: &mut [f32]) {
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    for (i, out) in out.iter_mut().enumerate() {
        let (chunks, rest) = rows[i * x.len()..][..x.len()].as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for (x, y) in x_chunks.iter().zip(chunks) {
            for i in 0..LANES {
                lanes[i] += x[i] * y[i];
            }
        }
        let tail: f32 = x_rest.iter().zip(rest).map(|(x, y)| x * y).sum();
        *out = lanes.iter().sum::<f32>() + tail;
    }
}
