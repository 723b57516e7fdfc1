//! The limits of a throttle group: read, checked and reported. By what they slow I/O down is for the block layer to say.

use super::ObjectError;
use ipc::graph::{Limit, ThrottleLimits};
use ipc::objects::types::THROTTLE_LIMITS;
use ipc::objects::{PropertyValue, Scalar};
use ipc::throttling::BlockIoThrottle;

/// Largest rate or burst.
const MAX: i64 = 1_000_000_000_000_000;

/// Limits by the names of [`THROTTLE_LIMITS`]. Rates and bursts of 0 do not limit; burst lengths are in seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits([i64; THROTTLE_LIMITS.len()]);

impl Default for Limits {
    fn default() -> Self {
        let mut limits = Self([0; THROTTLE_LIMITS.len()]);
        for (name, value) in THROTTLE_LIMITS.iter().zip(&mut limits.0) {
            if name.ends_with("-max-length") {
                *value = 1;
            }
        }
        limits
    }
}

impl Limits {
    /// What block_set_io_throttle asks for; whether the limits fit together is for [`Self::check`].
    pub fn of_device(asked: &BlockIoThrottle) -> Self {
        let mut limits = Self::default();
        let rates = [
            ("bps-total", asked.bps, asked.bps_max, asked.bps_max_length),
            ("bps-read", asked.bps_rd, asked.bps_rd_max, asked.bps_rd_max_length),
            ("bps-write", asked.bps_wr, asked.bps_wr_max, asked.bps_wr_max_length),
            ("iops-total", asked.iops, asked.iops_max, asked.iops_max_length),
            ("iops-read", asked.iops_rd, asked.iops_rd_max, asked.iops_rd_max_length),
            ("iops-write", asked.iops_wr, asked.iops_wr_max, asked.iops_wr_max_length),
        ];
        for (name, rate, burst, length) in rates {
            limits.put(name, rate);
            limits.put(&format!("{name}-max"), burst.unwrap_or(0));
            limits.put(&format!("{name}-max-length"), length.unwrap_or(1));
        }
        limits.put("iops-size", asked.iops_size.unwrap_or(0));
        limits
    }

    fn put(&mut self, name: &str, value: i64) {
        if let Some(place) = THROTTLE_LIMITS.iter().position(|known| *known == name) {
            self.0[place] = value;
        }
    }

    /// Whether anything is limited.
    pub fn is_enabled(&self) -> bool {
        ["bps", "iops"]
            .iter()
            .flat_map(|unit| ["total", "read", "write"].map(|what| self.get(&format!("{unit}-{what}"))))
            .any(|rate| rate != 0)
    }

    /// As block-proc takes them. They have been checked.
    pub fn to_wire(&self) -> ThrottleLimits {
        // An `iops-size` below 0 passes the checks, and then no request is as large.
        let number = |name: &str| self.get(name) as u64;
        let limit = |name: &str| Limit {
            average: number(name),
            max: number(&format!("{name}-max")),
            length: number(&format!("{name}-max-length")),
        };
        ThrottleLimits {
            bps_total: limit("bps-total"),
            bps_read: limit("bps-read"),
            bps_write: limit("bps-write"),
            iops_total: limit("iops-total"),
            iops_read: limit("iops-read"),
            iops_write: limit("iops-write"),
            iops_size: number("iops-size"),
        }
    }

    /// A limit by its name. What has no such name is 0.
    pub fn get(&self, name: &str) -> i64 {
        let place = THROTTLE_LIMITS.iter().position(|known| *known == name);
        place.map_or(0, |place| self.0[place])
    }

    /// Sets a limit; whether the limits fit together is for [`Self::check`].
    ///
    /// # Errors
    /// When there is no such limit.
    pub fn set(&mut self, name: &str, value: i64) -> Result<(), ObjectError> {
        let place = THROTTLE_LIMITS.iter().position(|known| *known == name);
        let place = place.ok_or_else(|| ObjectError::Unexpected(format!("limits.{name}")))?;
        self.0[place] = value;
        Ok(())
    }

    /// Takes the members of a `limits` value; the others stay.
    ///
    /// # Errors
    /// When one has no such name or is no integer.
    pub fn set_all(&mut self, value: &PropertyValue) -> Result<(), ObjectError> {
        let PropertyValue::Struct(members) = value else {
            return Err(ObjectError::Type("limits".into(), "object"));
        };
        for (name, value) in members {
            let Scalar::Int(value) = value else {
                return Err(ObjectError::Type(format!("limits.{name}"), "integer"));
            };
            self.set(name, *value)?;
        }
        Ok(())
    }

    /// All of them, as qom-get shows them.
    pub fn value(&self) -> PropertyValue {
        let members = THROTTLE_LIMITS.iter().zip(&self.0);
        PropertyValue::Struct(
            members
                .map(|(name, value)| ((*name).to_owned(), (*value).into()))
                .collect(),
        )
    }

    /// Whether they fit together.
    ///
    /// # Errors
    /// QEMU's text for the first rule that is broken.
    pub fn check(&self) -> Result<(), ObjectError> {
        let refuse = |text| Err(ObjectError::Limits(text));
        for (unit, suffix) in [("bps", ""), ("iops", ""), ("bps", "-max"), ("iops", "-max")] {
            let of = |what: &str| self.get(&format!("{unit}-{what}{suffix}"));
            if of("total") != 0 && (of("read") != 0 || of("write") != 0) {
                return refuse("bps/iops/max total values and read/write values cannot be used at the same time");
            }
        }
        let has_iops = ["total", "read", "write"]
            .iter()
            .any(|what| self.get(&format!("iops-{what}")) != 0);
        if self.get("iops-size") != 0 && !has_iops {
            return refuse("iops size requires an iops value to be set");
        }
        for unit in ["bps", "iops"] {
            for what in ["total", "read", "write"] {
                let rate = self.get(&format!("{unit}-{what}"));
                let burst = self.get(&format!("{unit}-{what}-max"));
                let length = self.get(&format!("{unit}-{what}-max-length"));
                if !(0..=MAX).contains(&rate) || !(0..=MAX).contains(&burst) {
                    return refuse("bps/iops/max values must be within [0, 1000000000000000]");
                }
                if length <= 0 {
                    return refuse("the burst length cannot be 0");
                }
                if length > 1 && burst == 0 {
                    return refuse("burst length set without burst rate");
                }
                if burst != 0 && length > MAX / burst {
                    return refuse("burst length too high for this burst rate");
                }
                if burst != 0 && rate == 0 {
                    return refuse("bps_max/iops_max require corresponding bps/iops values");
                }
                if burst != 0 && burst < rate {
                    return refuse("bps_max/iops_max cannot be lower than bps/iops");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_contradict_each_other_are_refused_with_the_reason() {
        for (members, reason) in [
            (&[("iops-total", 5)][..], ""),
            (&[("iops-read", 5), ("iops-write", 6), ("bps-total", 7)], ""),
            (
                &[("bps-total", 5), ("bps-total-max", 10), ("bps-total-max-length", 3)],
                "",
            ),
            (&[("iops-total", 5), ("iops-read", 1)], "at the same time"),
            (
                &[("bps-read", 1), ("bps-read-max", 2), ("bps-total-max", 5)],
                "at the same time",
            ),
            (&[("iops-size", 5)], "requires an iops value"),
            (&[("iops-total", -1)], "within"),
            (&[("iops-total", MAX + 1)], "within"),
            (&[("iops-total-max-length", 0)], "cannot be 0"),
            (&[("iops-total-max-length", 2)], "without burst rate"),
            (&[("iops-total-max", 2)], "require corresponding"),
            (&[("iops-total", 5), ("iops-total-max", 2)], "cannot be lower"),
            (
                &[("iops-total", 5), ("iops-total-max", MAX), ("iops-total-max-length", 2)],
                "too high",
            ),
        ] {
            let mut limits = Limits::default();
            for (name, value) in members {
                limits.set(name, *value).unwrap();
            }
            match limits.check() {
                Ok(()) => assert_eq!(reason, "", "{members:?}"),
                Err(error) => assert!(
                    !reason.is_empty() && error.to_string().contains(reason),
                    "{members:?}: {error}"
                ),
            }
        }
        assert!(Limits::default().set("iops-zotal", 1).is_err());
    }

    /// block_set_io_throttle, as QEMU answered it: the limits are checked when the device is known.
    #[test]
    fn limits_of_a_device_are_judged_as_recorded() {
        const PAIRS: &str = include_str!("../../../tests/data/replies.jsonl");
        let mut seen = 0;
        for line in PAIRS
            .lines()
            .filter(|line| line.contains(r#""execute": "block_set_io_throttle""#))
        {
            let pair: serde_json::Value = serde_json::from_str(line).unwrap();
            let Ok(asked) = serde_json::from_value::<BlockIoThrottle>(pair["arguments"].clone()) else {
                continue;
            };
            if asked.device.as_deref() != Some("drive0") || asked.id.is_some() {
                continue;
            }
            let checked = Limits::of_device(&asked).check().map_err(|error| error.to_string());
            let expected = pair["error"]["desc"].as_str();
            assert_eq!(checked.err().as_deref(), expected, "{line}");
            seen += 1;
        }
        assert!(seen >= 15, "{seen} pairs");
    }

    #[test]
    fn limits_arrive_where_they_belong() {
        let asked = BlockIoThrottle {
            bps_rd: 5,
            bps_rd_max: Some(7),
            bps_rd_max_length: Some(3),
            iops: 9,
            iops_size: Some(4096),
            ..BlockIoThrottle::default()
        };
        let limits = Limits::of_device(&asked);
        assert!(limits.is_enabled() && !Limits::default().is_enabled());
        let wire = limits.to_wire();
        let limit = |average, max, length| Limit { average, max, length };
        assert_eq!(wire.bps_read, limit(5, 7, 3));
        assert_eq!(wire.iops_total, limit(9, 0, 1));
        assert_eq!(wire.bps_total, limit(0, 0, 1));
        assert_eq!(wire.iops_size, 4096);
    }
}
