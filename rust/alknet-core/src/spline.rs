//! Monotone cubic splines (PCHIP), evaluated in double precision. No I/O.
//!
//! Between knots: the cubic Hermite interpolant with Fritsch and Butland's slopes, which is monotone
//! wherever the data are. Outside: the tail that the caller names.
//!
//! Source: Fritsch & Butland, *A method for constructing local monotone piecewise cubic interpolants*,
//! SIAM J. Sci. Stat. Comput. 5 (1984); the end slopes and the weighting are those of
//! `scipy.interpolate.PchipInterpolator`, which the tests compare with.

/// A monotone, non-decreasing function through its knots.
#[derive(Debug, Clone, PartialEq)]
pub struct MonotoneSpline {
    x: Vec<f64>,
    y: Vec<f64>,
    slopes: Vec<f64>,
}

impl MonotoneSpline {
    /// The spline through `(x[i], y[i])`.
    ///
    /// # Errors
    /// Says which of these fails: as many `x` as `y`, at least two; all finite; `x` strictly
    /// increasing; `y` non-decreasing.
    pub fn new(x: Vec<f64>, y: Vec<f64>) -> Result<Self, String> {
        if x.len() != y.len() || x.len() < 2 {
            return Err(format!(
                "a spline of {} knots has {} values; both must be ≥ 2",
                x.len(),
                y.len()
            ));
        }
        if !x.iter().chain(&y).all(|v| v.is_finite()) {
            return Err("a spline knot or value is not finite".into());
        }
        if let Some(i) = x.windows(2).position(|w| w[0] >= w[1]) {
            return Err(format!("spline knots {i} and {} do not increase", i + 1));
        }
        if let Some(i) = y.windows(2).position(|w| w[0] > w[1]) {
            return Err(format!(
                "spline values {i} and {} decrease: the spline is not monotone",
                i + 1
            ));
        }
        let slopes = pchip_slopes(&x, &y);
        Ok(Self { x, y, slopes })
    }

    /// Value and slope at the first and at the last knot.
    pub fn ends(&self) -> ((f64, f64), (f64, f64)) {
        let last = self.x.len() - 1;
        ((self.y[0], self.slopes[0]), (self.y[last], self.slopes[last]))
    }

    /// Value at `x`, held constant outside the knots. NaN in, NaN out.
    pub fn eval_clamped(&self, x: f64) -> f64 {
        let last = self.x.len() - 1;
        if x <= self.x[0] {
            return self.y[0];
        }
        if x >= self.x[last] {
            return self.y[last];
        }
        if x.is_nan() {
            return x;
        }
        let i = self.x.partition_point(|&knot| knot <= x) - 1;
        self.hermite(i, x)
    }

    /// Value at `x`: constant below the first knot, straight on with the last slope above the last.
    pub fn eval_linear_above(&self, x: f64) -> f64 {
        let last = self.x.len() - 1;
        if x > self.x[last] {
            return self.y[last] + self.slopes[last] * (x - self.x[last]);
        }
        self.eval_clamped(x)
    }

    /// Value at `x` of a distribution function whose values lie in (0, 1): exponential tails that
    /// continue value and slope, so that the result stays in (0, 1) up to rounding.
    pub fn eval_cdf(&self, x: f64) -> f64 {
        let last = self.x.len() - 1;
        if x < self.x[0] {
            return self.y[0] * (self.slopes[0] / self.y[0] * (x - self.x[0])).exp();
        }
        if x > self.x[last] {
            let above = 1.0 - self.y[last];
            return 1.0 - above * (-self.slopes[last] / above * (x - self.x[last])).exp();
        }
        self.eval_clamped(x)
    }

    /// Cubic Hermite interpolant on interval `i`.
    fn hermite(&self, i: usize, x: f64) -> f64 {
        let h = self.x[i + 1] - self.x[i];
        let t = (x - self.x[i]) / h;
        let (a, b) = (self.slopes[i] * h, self.slopes[i + 1] * h);
        let rise = self.y[i + 1] - self.y[i];
        let value = self.y[i] + t * (a + t * (3.0 * rise - 2.0 * a - b + t * (a + b - 2.0 * rise)));
        // The cubic is monotone in exact arithmetic; rounding may leave the interval by one unit.
        value.clamp(self.y[i], self.y[i + 1])
    }
}

/// Slopes at the knots.
fn pchip_slopes(x: &[f64], y: &[f64]) -> Vec<f64> {
    let n = x.len();
    let h: Vec<f64> = x.windows(2).map(|w| w[1] - w[0]).collect();
    let delta: Vec<f64> = y.windows(2).zip(&h).map(|(w, h)| (w[1] - w[0]) / h).collect();
    if n == 2 {
        return vec![delta[0]; 2];
    }
    let mut slopes = vec![0.0; n];
    for i in 1..n - 1 {
        if delta[i - 1] > 0.0 && delta[i] > 0.0 {
            let (w1, w2) = (2.0 * h[i] + h[i - 1], h[i] + 2.0 * h[i - 1]);
            slopes[i] = (w1 + w2) / (w1 / delta[i - 1] + w2 / delta[i]);
        }
    }
    slopes[0] = end_slope(h[0], h[1], delta[0], delta[1]);
    slopes[n - 1] = end_slope(h[n - 2], h[n - 3], delta[n - 2], delta[n - 3]);
    slopes
}

/// One-sided three-point slope, limited so that the end interval stays monotone.
fn end_slope(h0: f64, h1: f64, d0: f64, d1: f64) -> f64 {
    let slope = ((2.0 * h0 + h1) * d0 - h0 * d1) / (h0 + h1);
    slope.clamp(0.0, 3.0 * d0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rejects_what_is_not_monotone() {
        let new = |x: &[f64], y: &[f64]| MonotoneSpline::new(x.to_vec(), y.to_vec());
        assert!(new(&[0.0, 1.0], &[1.0, 0.5]).unwrap_err().contains("not monotone"));
        assert!(new(&[0.0, 0.0], &[0.0, 0.5]).unwrap_err().contains("do not increase"));
        assert!(new(&[0.0, f64::NAN], &[0.0, 0.5]).unwrap_err().contains("finite"));
        assert!(new(&[0.0], &[0.0]).is_err());
        assert!(new(&[0.0, 1.0, 2.0], &[0.0, 0.5]).is_err());
    }

    #[test]
    fn equals_scipy() {
        // scipy.interpolate.PchipInterpolator([0, 1, 3, 4], [0, .2, .9, 1])([.5, 2, 3.5, .1, 3.9])
        let spline =
            MonotoneSpline::new(vec![0.0, 1.0, 3.0, 4.0], vec![0.0, 0.2, 0.9, 1.0]).unwrap();
        let scipy = [
            (0.5, 0.08786764705882354),
            (2.0, 0.5751367989056088),
            (3.5, 0.9662306201550388),
            (0.1, 0.015526470588235298),
            (3.9, 0.9971686046511626),
        ];
        for (x, y) in scipy {
            assert!((spline.eval_clamped(x) - y).abs() < 1e-12, "{x}: {}", spline.eval_clamped(x));
        }
    }

    proptest! {
        #[test]
        fn is_monotone_and_bounded(
            steps in prop::collection::vec((1e-3f64..2.0, 1e-4f64..1.0), 3..20),
            a in -10f64..60.0, b in -10f64..60.0,
        ) {
            let total: f64 = steps.iter().map(|s| s.1).sum::<f64>() * 1.02;
            let (mut x, mut y) = (0.0, total * 0.01);
            let (mut xs, mut ys) = (vec![0.0], vec![y / total]);
            for (dx, dy) in steps {
                x += dx;
                y += dy;
                xs.push(x);
                ys.push(y / total);
            }
            let spline = MonotoneSpline::new(xs, ys).unwrap();
            let (a, b) = (a.min(b), a.max(b));
            prop_assert!(spline.eval_cdf(a) <= spline.eval_cdf(b));
            prop_assert!(spline.eval_linear_above(a) <= spline.eval_linear_above(b));
            prop_assert!((0.0..=1.0).contains(&spline.eval_cdf(a)));
        }
    }
}
