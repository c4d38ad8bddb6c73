//! The product of bytes, for registers of any width.
//!
//! A register of weights holds four inputs of each of its outputs, and is multiplied by four inputs of
//! one row: four products are added to each 32-bit sum, by one instruction where there is VNNI.

/// Defines `matmul`, which is [`crate::scalar::matmul`] in tiles of rows by two registers.
///
/// - `features`: what the functions are compiled for
/// - `outputs`: sums in a register, 8 or 16
/// - `rows`: heights of a tile, each from 1 on; the last is the highest
/// - `sum`: adds the products of some rows and two registers of weights, such as [`byte_sum`] defines
/// - `dot`: adds four products to each sum
/// - the rest: intrinsics of that width
macro_rules! byte_matmul {
    (
        features: $features:literal,
        outputs: $outputs:literal,
        rows: $($rows:literal)*,
        zero: $zero:ident,
        splat: $splat:ident,
        load: $load:ident,
        sum: $sum:ident,
        dot: $dot:ident,
        convert: $convert:ident,
        splat_float: $splat_float:ident,
        load_float: $load_float:ident,
        multiply: $multiply:ident,
        multiply_add: $multiply_add:ident,
        store_float: $store_float:ident,
    ) => {
        /// [`crate::scalar::matmul`] in tiles of rows by two registers of outputs.
        ///
        /// A pair of registers stays in the first-level cache over all tiles, the next pair is fetched
        /// meanwhile.
        #[target_feature(enable = $features)]
        fn matmul(
            x: &QuantizedRows,
            rows: Range<usize>,
            w: &PackedMatrix,
            panels: Range<usize>,
            out: &mut [f32],
        ) {
            const TILE_ROWS: usize = [$($rows),*].len();
            const PANELS: usize = 2 * $outputs / LANES;
            let columns = panels.len() * LANES;
            let tiles = rows.len().div_ceil(TILE_ROWS);
            for panel in panels.clone().step_by(PANELS) {
                let next = if panel + PANELS < panels.end { panel + PANELS } else { panel };
                let fetch = w.panel_range(next..panels.end);
                let mut row = rows.start;
                for tile in 0..tiles {
                    // Tiles of nearly equal height keep more sums in flight than a short last one.
                    let height = (rows.end - row).div_ceil(tiles - tile);
                    let first = (row - rows.start) * columns + (panel - panels.start) * LANES;
                    let out = &mut out[first..];
                    if panel + PANELS <= panels.end {
                        tile_of_height::<2>(height, x, row, w, panel, fetch, out, columns);
                    } else {
                        tile_of_height::<1>(height, x, row, w, panel, fetch, out, columns);
                    }
                    row += height;
                }
            }
        }

        /// Calls [`tile`] with a constant height.
        #[expect(clippy::too_many_arguments, reason = "what `tile` needs")]
        #[inline]
        #[target_feature(enable = $features)]
        fn tile_of_height<const P: usize>(
            height: usize,
            x: &QuantizedRows,
            row: usize,
            w: &PackedMatrix,
            panel: usize,
            fetch: &[u8],
            out: &mut [f32],
            columns: usize,
        ) {
            match height {
                $($rows => tile::<$rows, P>(x, row, w, panel, fetch, out, columns),)*
                _ => unreachable!("tiles are no higher than listed"),
            }
        }

        /// `R` rows by `P` registers, `columns` numbers from one row of `out` to the next; `fetch` is
        /// read soon.
        #[target_feature(enable = $features)]
        fn tile<const R: usize, const P: usize>(
            x: &QuantizedRows,
            row: usize,
            w: &PackedMatrix,
            panel: usize,
            fetch: &[u8],
            out: &mut [f32],
            columns: usize,
        ) {
            let stride = x.stride();
            let bytes = w.panel_range(panel..panel + (P * $outputs).div_ceil(LANES));
            // Where register `p` of four inputs starts: its panel, and its place within it.
            let start = |p: usize| {
                p * $outputs / LANES * LANES * stride + p * $outputs % LANES * 4
            };
            let mut sums = [[$zero(); P]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                *sums = [$splat(x.offsets[row + r]); P];
            }
            $sum(&x.data[row * stride..][..R * stride], bytes, fetch, &mut sums);
            for (r, sums) in sums.iter_mut().enumerate() {
                for excess in x.excess(row + r) {
                    let four = $splat(i32::from_le_bytes(excess.four.map(|q| q as u8)));
                    for (p, sum) in sums.iter_mut().enumerate() {
                        let at = start(p) + excess.first as usize * LANES;
                        // SAFETY: a panel has 16 · stride bytes, and words lie within the stride.
                        *sum = unsafe { $dot(*sum, $load(bytes.as_ptr().add(at).cast()), four) };
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let row_scale = $splat_float(x.scales[row + r]);
                for (p, sum) in sums.iter().enumerate() {
                    let out = &mut out[r * columns + p * $outputs..][..$outputs];
                    let (panel, first) = (panel + p * $outputs / LANES, p * $outputs % LANES);
                    let scale = &w.scales(panel)[first..][..$outputs];
                    let bias = &w.bias(panel)[first..][..$outputs];
                    // SAFETY: the three slices are as long as a register.
                    unsafe {
                        let product = $multiply($convert(*sum), row_scale);
                        let (scale, bias) = ($load_float(scale.as_ptr()), $load_float(bias.as_ptr()));
                        $store_float(out.as_mut_ptr(), $multiply_add(product, scale, bias));
                    }
                }
            }
        }
    };
}
pub(crate) use byte_matmul;

/// Defines a function that adds the products of `R` rows and `P` registers of weights to their sums, with
/// intrinsics.
///
/// - `name`: of the function
/// - `register`: its type
/// - the rest: as for [`byte_matmul`]
macro_rules! byte_sum {
    (
        name: $name:ident,
        features: $features:literal,
        register: $register:ty,
        outputs: $outputs:literal,
        splat: $splat:ident,
        load: $load:ident,
        dot: $dot:ident,
    ) => {
        /// # Shapes
        /// - `q`: `[R, stride]`; `weights`: the panels, `[.., stride / 4, LANES, 4]`; `sums`: `[R, P]`
        ///
        /// What follows as many bytes of `fetch` is read soon.
        #[inline]
        #[target_feature(enable = $features)]
        fn $name<const R: usize, const P: usize>(
            q: &[i8],
            weights: &[u8],
            fetch: &[u8],
            sums: &mut [[$register; P]; R],
        ) {
            let stride = q.len() / R;
            assert!(stride.is_multiple_of(8) && weights.len() >= P * $outputs * stride);
            let (q, bytes) = (q.as_ptr(), weights.as_ptr());
            // Two words a turn: with one or with four, the units that multiply wait for each other.
            for start in (0..stride).step_by(8) {
                for k in [start, start + 4] {
                    let weights: [_; P] = std::array::from_fn(|p| {
                        let at = p * $outputs / LANES * LANES * stride
                            + p * $outputs % LANES * 4
                            + k * LANES;
                        // SAFETY: a prefetch of any address is harmless.
                        #[allow(unused_unsafe, reason = "prefetching is unsafe in older compilers")]
                        unsafe {
                            _mm_prefetch::<_MM_HINT_T0>(fetch.as_ptr().wrapping_add(at).cast());
                        }
                        // SAFETY: there are as many bytes, as asserted.
                        unsafe { $load(bytes.add(at).cast()) }
                    });
                    for (r, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: row `r` has `stride` bytes, and k ≤ stride − 4.
                        let four = unsafe { q.add(r * stride + k).cast::<i32>().read_unaligned() };
                        let four = $splat(four);
                        for (sum, weights) in sums.iter_mut().zip(weights) {
                            *sum = $dot(*sum, weights, four);
                        }
                    }
                }
            }
        }
    };
}
pub(crate) use byte_sum;
