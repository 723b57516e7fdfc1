//! Numbers: text → value and double → text.

use super::Value;

/// The value of a number token without fraction and exponent: the narrowest of `i64`, `u64` and double that holds it.
pub fn integer(text: &str) -> Value {
    if let Ok(int) = text.parse::<i64>() {
        return Value::Int(int);
    }
    if let Ok(uint) = text.parse::<u64>() {
        return Value::Uint(uint);
    }
    double(text)
}

/// The value of a number token with a fraction or an exponent. Beyond the range of doubles it is an infinity.
pub fn double(text: &str) -> Value {
    // The lexer has checked the syntax, which is a subset of what `parse` takes.
    Value::Double(text.parse().unwrap_or(f64::NAN))
}

/// Writes a double as C's `%.17g` does: 17 significant digits, trailing zeros dropped.
///
/// JSON has no infinities; a server that prints `inf` breaks its client's parser. `1e999` is valid JSON and reads back
/// as an infinity nearly everywhere.
pub fn print_double(out: &mut Vec<u8>, double: f64) {
    if !double.is_finite() {
        out.extend_from_slice(if double < 0.0 { b"-1e999" } else { b"1e999" });
        return;
    }
    // d.dddddddddddddddde[-]x, correctly rounded.
    let scientific = format!("{:.16e}", double.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let digits: Vec<u8> = mantissa.bytes().filter(u8::is_ascii_digit).collect();
    let significant = digits
        .iter()
        .rposition(|digit| *digit != b'0')
        .map_or(1, |last| last + 1);
    let digits = &digits[..significant];
    if double.is_sign_negative() {
        out.push(b'-');
    }
    if !(-4..17).contains(&exponent) {
        out.push(digits[0]);
        if digits.len() > 1 {
            out.push(b'.');
            out.extend_from_slice(&digits[1..]);
        }
        let sign = if exponent < 0 { '-' } else { '+' };
        out.extend_from_slice(format!("e{sign}{:02}", exponent.abs()).as_bytes());
    } else if exponent < 0 {
        out.extend_from_slice(b"0.");
        out.extend(std::iter::repeat_n(b'0', (-exponent - 1) as usize));
        out.extend_from_slice(digits);
    } else {
        let whole = exponent as usize + 1;
        out.extend((0..whole).map(|i| digits.get(i).copied().unwrap_or(b'0')));
        if digits.len() > whole {
            out.push(b'.');
            out.extend_from_slice(&digits[whole..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn printed(double: f64) -> String {
        let mut out = Vec::new();
        print_double(&mut out, double);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn integers_take_the_narrowest_type() {
        assert_eq!(integer("-0"), Value::Int(0));
        assert_eq!(integer("9223372036854775807"), Value::Int(i64::MAX));
        assert_eq!(integer("9223372036854775808"), Value::Uint(1 << 63));
        assert_eq!(integer("18446744073709551615"), Value::Uint(u64::MAX));
        assert_eq!(
            integer("18446744073709551616"),
            Value::Double(18_446_744_073_709_551_616.0)
        );
        assert_eq!(integer("-9223372036854775808"), Value::Int(i64::MIN));
        assert_eq!(
            integer("-9223372036854775809"),
            Value::Double(-9_223_372_036_854_775_809.0)
        );
    }

    /// Pairs seen from a live server, but for the infinities.
    #[test]
    fn doubles_print_as_on_a_live_server() {
        for (text, expected) in [
            ("1.0", "1"),
            ("-0.0", "-0"),
            ("0.1", "0.10000000000000001"),
            ("0.0001", "0.0001"),
            ("1e-5", "1.0000000000000001e-05"),
            ("1e16", "10000000000000000"),
            ("1e17", "1e+17"),
            ("1e-400", "0"),
            ("18446744073709551616", "1.8446744073709552e+19"),
            ("-9223372036854775809", "-9.2233720368547758e+18"),
            ("123456789012345678901234567890", "1.2345678901234568e+29"),
            ("1e400", "1e999"),
            ("-1e400", "-1e999"),
        ] {
            let Value::Double(value) = double(text) else {
                panic!("{text}")
            };
            assert_eq!(printed(value), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_double_reads_back_as_printed(double in proptest::num::f64::ANY) {
            prop_assume!(!double.is_nan());
            prop_assert_eq!(printed(double).parse::<f64>().unwrap().to_bits(), double.to_bits());
        }
    }
}
