//! The product of bf16 numbers in fp32, for registers of any width.

/// Defines `product`, which is [`crate::attention::Arithmetic::product`] in tiles of rows by registers.
///
/// - `features`: what the functions are compiled for
/// - `numbers`: in a register, 8 or 16
/// - `rows`: heights of a tile, each from 1 on; the last is the highest
/// - `registers`: widths of a tile; the last is the widest, and the first divides all numbers of columns
/// - the rest: intrinsics of that width
macro_rules! bf16_product {
    (
        features: $features:literal,
        numbers: $numbers:literal,
        rows: $($rows:literal)*,
        registers: $($registers:literal)*,
        zero: $zero:ident,
        splat: $splat:ident,
        load: $load:ident,
        multiply_add: $multiply_add:ident,
        add: $add:ident,
        store: $store:ident,
    ) => {
        /// [`crate::attention::Arithmetic::product`].
        #[target_feature(enable = $features)]
        fn product<const ADD: bool>(a: &Operand<'_>, b: &[f32], n: usize, c: &mut [f32]) {
            const WIDEST: usize = [$($registers),*][[$($registers),*].len() - 1];
            let mut column = 0;
            while column < n {
                let width = ((n - column) / $numbers).min(WIDEST);
                match width {
                    $($registers => columns::<ADD, $registers>(a, &b[column..], n, &mut c[column..]),)*
                    _ => unreachable!("columns come in whole tiles"),
                }
                column += width * $numbers;
            }
        }

        /// All rows of `P` registers of columns.
        #[inline]
        #[target_feature(enable = $features)]
        fn columns<const ADD: bool, const P: usize>(
            a: &Operand<'_>,
            b: &[f32],
            n: usize,
            c: &mut [f32],
        ) {
            // It starts at a column: the last row is short.
            let rows = c.len().div_ceil(n);
            let tiles = rows.div_ceil([$($rows),*].len());
            let mut row = 0;
            for tile in 0..tiles {
                let height = (rows - row).div_ceil(tiles - tile);
                let left = Operand { numbers: &a.numbers[row * a.row..], ..*a };
                let c = &mut c[row * n..];
                match height {
                    $($rows => steps::<ADD, $rows, P>(&left, b, n, c),)*
                    _ => unreachable!("tiles are no higher than listed"),
                }
                row += height;
            }
        }

        /// `R` rows by `P` registers of columns: [`scalar::add_product`] for every step.
        #[target_feature(enable = $features)]
        fn steps<const ADD: bool, const R: usize, const P: usize>(
            a: &Operand<'_>,
            b: &[f32],
            n: usize,
            c: &mut [f32],
        ) {
            let (depth, width) = (b.len().div_ceil(n), P * $numbers);
            assert!(depth > 0 && a.numbers.len() > (R - 1) * a.row + (depth - 1) * a.column);
            assert!(b.len() >= (depth - 1) * n + width && c.len() >= (R - 1) * n + width);
            for start in (0..depth).step_by(scalar::STEP) {
                let end = depth.min(start + scalar::STEP);
                let [even, odd] = [start, start + 1].map(|first| {
                    let mut sums = [[$zero(); P]; R];
                    for k in (first..end).step_by(2) {
                        // SAFETY: every access is within the bounds asserted above.
                        unsafe {
                            let columns: [_; P] = std::array::from_fn(|p| {
                                $load(b.as_ptr().add(k * n + p * $numbers))
                            });
                            for (r, sums) in sums.iter_mut().enumerate() {
                                let a = $splat(*a.numbers.as_ptr().add(r * a.row + k * a.column));
                                for (sum, column) in sums.iter_mut().zip(columns) {
                                    *sum = $multiply_add(a, column, *sum);
                                }
                            }
                        }
                    }
                    sums
                });
                for (r, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                    for (p, (even, odd)) in even.into_iter().zip(odd).enumerate() {
                        // SAFETY: as above.
                        unsafe {
                            let c = c.as_mut_ptr().add(r * n + p * $numbers);
                            let sum = if ADD || start > 0 { $load(c) } else { $zero() };
                            $store(c, $add(sum, $add(even, odd)));
                        }
                    }
                }
            }
        }
    };
}
pub(crate) use bf16_product;
