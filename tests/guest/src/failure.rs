//! Why a test failed.

/// One line for the report.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// What was looked at.
    pub what: &'static str,
    /// What it was; meaningless where there is no number.
    pub got: u64,
    /// What it should have been.
    pub want: u64,
}

/// What tests return.
pub type Outcome = Result<(), Failure>;

impl core::fmt::Display for Failure {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(out, "{}: got {:#x}, want {:#x}", self.what, self.got, self.want)
    }
}

/// A failure without numbers.
pub fn failure(what: &'static str) -> Failure {
    Failure { what, got: 0, want: 1 }
}

/// Fails unless the condition holds.
pub fn ensure(condition: bool, what: &'static str) -> Outcome {
    if condition { Ok(()) } else { Err(failure(what)) }
}

/// Fails unless the numbers are equal.
pub fn equal(what: &'static str, got: impl Into<u64>, want: impl Into<u64>) -> Outcome {
    let (got, want) = (got.into(), want.into());
    if got == want {
        Ok(())
    } else {
        Err(Failure { what, got, want })
    }
}
