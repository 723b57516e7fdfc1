//! Which way a job can go, and what clients may ask of it where: the tables are QMP's.

use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting};
use ipc::job::JobStatus;

/// What a client can ask of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// job-cancel, block-job-cancel.
    Cancel,
    /// job-pause, block-job-pause.
    Pause,
    /// job-resume, block-job-resume.
    Resume,
    /// block-job-set-speed.
    SetSpeed,
    /// job-complete, block-job-complete.
    Complete,
    /// job-finalize.
    Finalize,
    /// job-dismiss.
    Dismiss,
    /// block-job-change.
    Change,
}

impl Verb {
    /// QMP's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
            Self::Change => "change",
        }
    }
}

/// Whether a job can go from one state to another.
pub fn leads_to(from: JobStatus, to: JobStatus) -> bool {
    let next: &[JobStatus] = match from {
        Undefined => &[Created],
        Created => &[Running, Aborting, Null],
        Running => &[Paused, Ready, Waiting, Aborting],
        Paused => &[Running],
        Ready => &[Standby, Waiting, Aborting],
        Standby => &[Ready],
        Waiting => &[Pending, Aborting],
        Pending | Aborting => &[Aborting, Concluded],
        Concluded => &[Null],
        Null => &[],
    };
    next.contains(&to)
}

/// Whether a job takes a client's request in a state.
pub fn takes(status: JobStatus, verb: Verb) -> bool {
    match verb {
        Verb::Cancel => matches!(status, Created | Running | Paused | Ready | Standby | Waiting | Pending),
        Verb::Pause | Verb::Resume | Verb::SetSpeed => matches!(status, Created | Running | Paused | Ready | Standby),
        Verb::Complete => matches!(status, Ready | Standby),
        Verb::Change => matches!(status, Running | Paused | Ready | Standby),
        Verb::Finalize => status == Pending,
        Verb::Dismiss => status == Concluded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same tables, as matrices over the states in QMP's order.
    #[test]
    fn the_tables_are_those_of_the_protocol() {
        const WAYS: [&str; 11] = [
            "01000000000",
            "00100000101",
            "00011010100",
            "00100000000",
            "00000110100",
            "00001000000",
            "00000001100",
            "00000000110",
            "00000000110",
            "00000000001",
            "00000000000",
        ];
        const VERBS: [(Verb, &str); 8] = [
            (Verb::Cancel, "01111111000"),
            (Verb::Pause, "01111100000"),
            (Verb::Resume, "01111100000"),
            (Verb::SetSpeed, "01111100000"),
            (Verb::Complete, "00001100000"),
            (Verb::Change, "00111100000"),
            (Verb::Finalize, "00000001000"),
            (Verb::Dismiss, "00000000010"),
        ];
        let row = |bits: &dyn Fn(JobStatus) -> bool| -> String {
            let digits = JobStatus::ALL
                .iter()
                .map(|status| if bits(*status) { '1' } else { '0' });
            digits.collect()
        };
        for (from, way) in JobStatus::ALL.into_iter().zip(WAYS) {
            assert_eq!(row(&|to| leads_to(from, to)), way, "{from:?}");
        }
        for (verb, states) in VERBS {
            assert_eq!(row(&|status| takes(status, verb)), states, "{verb:?}");
        }
    }
}
