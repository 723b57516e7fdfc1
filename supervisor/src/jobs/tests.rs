use super::*;
use JobStatus::{Aborting, Concluded, Created, Null, Pending, Running, Waiting};

const BY_HAND: Endings = Endings {
    auto_finalize: false,
    auto_dismiss: false,
};
/// blockdev-create's.
const KEPT: Endings = Endings {
    auto_finalize: true,
    auto_dismiss: false,
};
const AUTOMATIC: Endings = Endings {
    auto_finalize: true,
    auto_dismiss: true,
};

fn jobs(endings: Endings) -> Jobs {
    let mut jobs = Jobs::default();
    assert_eq!(jobs.create("j", JobType::Create, endings).unwrap().0, [Created]);
    assert_eq!(jobs.start("j").0, [Running]);
    jobs
}

#[test]
fn a_job_that_succeeds_ends_as_far_as_it_does_by_itself() {
    let mut jobs = jobs(BY_HAND);
    assert_eq!(jobs.finish("j", Ok(())).0, [Waiting, Pending]);
    assert_eq!(jobs.finalize("j").unwrap().0, [Concluded]);
    assert_eq!(jobs.dismiss("j").unwrap().0, [Null]);
    assert_eq!(jobs.list(), []);
    let mut jobs = self::jobs(KEPT);
    assert_eq!(jobs.finish("j", Ok(())).0, [Waiting, Pending, Concluded]);
    assert_eq!(jobs.list()[0].status, Concluded);
    assert_eq!(jobs.list()[0].error, None);
    let mut jobs = self::jobs(AUTOMATIC);
    assert_eq!(jobs.finish("j", Ok(())).0, [Waiting, Pending, Concluded, Null]);
    assert_eq!(jobs.list(), []);
}

#[test]
fn a_job_that_fails_says_why() {
    let mut jobs = jobs(KEPT);
    assert_eq!(jobs.finish("j", Err("no space".into())).0, [Aborting, Concluded]);
    assert_eq!(jobs.list()[0].error.as_deref(), Some("no space"));
    assert_eq!(jobs.dismiss("j").unwrap().0, [Null]);
}

#[test]
fn a_cancelled_job_ends_aborted_whatever_its_work_came_to() {
    let mut jobs = jobs(KEPT);
    assert_eq!(jobs.cancel("j").unwrap(), Steps::default());
    assert_eq!(jobs.finish("j", Ok(())).0, [Aborting, Concluded]);
    assert_eq!(jobs.list()[0].error.as_deref(), Some("Operation canceled"));
    let mut jobs = self::jobs(BY_HAND);
    let _ = jobs.finish("j", Ok(()));
    assert_eq!(jobs.cancel("j").unwrap().0, [Aborting, Concluded]);
}

#[test]
fn what_a_state_does_not_allow_is_refused_by_name() {
    let mut jobs = jobs(KEPT);
    let refusal = |result: Result<Steps, JobError>| result.unwrap_err().to_string();
    assert_eq!(
        refusal(jobs.dismiss("j")),
        "Job 'j' in state 'running' cannot accept command verb 'dismiss'"
    );
    let _ = jobs.finish("j", Ok(()));
    assert_eq!(
        refusal(jobs.cancel("j")),
        "Job 'j' in state 'concluded' cannot accept command verb 'cancel'"
    );
    assert_eq!(
        refusal(jobs.finalize("j")),
        "Job 'j' in state 'concluded' cannot accept command verb 'finalize'"
    );
    assert_eq!(refusal(jobs.dismiss("k")), "Job not found");
}

#[test]
fn ids_are_identifiers_and_belong_to_one_job() {
    let mut jobs = jobs(KEPT);
    let mut refusal = |id: &str| jobs.create(id, JobType::Create, KEPT).unwrap_err().to_string();
    assert_eq!(refusal("j"), "Job ID 'j' already in use");
    assert_eq!(refusal("1"), "Invalid job ID '1'");
    assert_eq!(refusal(""), "Invalid job ID ''");
}

#[test]
fn there_are_only_so_many() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS {
        let _ = jobs.create(&format!("j{number}"), JobType::Create, KEPT).unwrap();
    }
    assert_eq!(jobs.create("one", JobType::Create, KEPT), Err(JobError::TooMany));
    assert_eq!(
        jobs.list()[0].id,
        format!("j{}", MAX_JOBS - 1),
        "the newest comes first"
    );
}
