use super::*;
use JobStatus::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Waiting};

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

/// What clients are told, in short: states, and the names of other events.
fn told(Steps(events): Steps) -> Vec<String> {
    let short = |event: Event| match event {
        Event::JobStatusChange { status, .. } => status.name().to_owned(),
        Event::BlockJobCompleted { error: Some(error), .. } => format!("COMPLETED: {error}"),
        Event::BlockJobCompleted { .. } => "COMPLETED".to_owned(),
        Event::BlockJobCancelled(_) => "CANCELLED".to_owned(),
        Event::BlockJobReady(_) => "READY".to_owned(),
        Event::BlockJobPending { .. } => "PENDING".to_owned(),
        other => format!("{other:?}"),
    };
    events.into_iter().map(short).collect()
}

fn states(states: &[JobStatus]) -> Vec<String> {
    states.iter().map(|status| status.name().to_owned()).collect()
}

fn begun(kind: JobType, endings: Endings) -> Jobs {
    let mut jobs = Jobs::default();
    assert_eq!(told(jobs.create("j", kind, endings, None).unwrap()), states(&[Created]));
    assert_eq!(told(jobs.start("j")), states(&[Running]));
    jobs
}

#[test]
fn a_job_that_succeeds_ends_as_far_as_it_does_by_itself() {
    let mut jobs = begun(JobType::Create, BY_HAND);
    let (steps, ready) = jobs.worked("j");
    assert_eq!((told(steps), ready), (states(&[Waiting, Pending]), None));
    assert!(jobs.ask("j", Verb::Finalize).is_ok());
    assert_eq!(told(jobs.succeed("j")), states(&[Concluded]));
    assert_eq!(told(jobs.dismiss("j").unwrap()), states(&[Null]));
    assert_eq!(jobs.list(), []);
    let mut jobs = begun(JobType::Create, KEPT);
    let (_, ready) = jobs.worked("j");
    assert_eq!(jobs.together(ready.unwrap()), ["j"]);
    assert_eq!(told(jobs.succeed("j")), states(&[Concluded]));
    assert_eq!((jobs.list()[0].status, &jobs.list()[0].error), (Concluded, &None));
    let mut jobs = begun(JobType::Commit, AUTOMATIC);
    let _ = jobs.worked("j");
    assert_eq!(told(jobs.succeed("j")), ["COMPLETED", "concluded", "null"]);
    assert_eq!(jobs.list(), []);
}

#[test]
fn a_mirror_is_ready_once_and_rests_standing_by() {
    let mut jobs = begun(JobType::Mirror, BY_HAND);
    assert_eq!(told(jobs.rest("j")), states(&[Paused]));
    assert_eq!(told(jobs.ready("j")), ["running", "ready", "READY", "standby"]);
    assert_eq!(told(jobs.wake("j")), states(&[Ready]));
    assert_eq!(told(jobs.rest("j")), states(&[Standby]));
    assert!(jobs.ask("j", Verb::Complete).is_ok());
    assert_eq!(told(jobs.wake("j")), states(&[Ready]));
    let (steps, _) = jobs.worked("j");
    assert_eq!(told(steps), ["waiting", "pending", "PENDING"]);
    assert!(jobs.list_block_jobs()[0].ready);
}

#[test]
fn a_job_that_fails_says_why() {
    let mut jobs = begun(JobType::Backup, KEPT);
    assert_eq!(told(jobs.abort("j", Some("no space".into()))), states(&[Aborting]));
    assert_eq!(told(jobs.conclude("j")), ["COMPLETED: no space", "concluded"]);
    assert_eq!(jobs.list()[0].error.as_deref(), Some("no space"));
    assert_eq!(told(jobs.dismiss("j").unwrap()), states(&[Null]));
}

#[test]
fn a_cancelled_job_is_told_as_such() {
    let mut jobs = begun(JobType::Stream, AUTOMATIC);
    let _ = jobs.rest("j");
    assert_eq!(told(jobs.abort("j", None)), states(&[Running, Aborting]));
    assert_eq!(told(jobs.conclude("j")), ["CANCELLED", "concluded", "null"]);
    let mut jobs = begun(JobType::Create, KEPT);
    let _ = (jobs.abort("j", None), jobs.conclude("j"));
    assert_eq!(jobs.list()[0].error.as_deref(), Some("Operation canceled"));
}

#[test]
fn jobs_of_a_transaction_wait_for_one_another() {
    let mut jobs = Jobs::default();
    let together = Some(jobs.new_transaction());
    for id in ["a", "b"] {
        let _ = jobs.create(id, JobType::Backup, AUTOMATIC, together).unwrap();
        let _ = jobs.start(id);
    }
    let (steps, ready) = jobs.worked("b");
    assert_eq!((told(steps), ready), (states(&[Waiting]), None));
    let (steps, ready) = jobs.worked("a");
    assert_eq!(told(steps), states(&[Waiting, Pending, Pending]));
    assert_eq!(
        (ready, jobs.together(ready.unwrap())),
        (together, vec!["a".into(), "b".into()])
    );
}

#[test]
fn what_does_not_begin_is_forgotten() {
    let mut jobs = Jobs::default();
    let _ = jobs.create("j", JobType::Commit, BY_HAND, None).unwrap();
    assert_eq!(jobs.set_speed("j", -1), Err(JobError::Speed));
    assert_eq!(told(jobs.give_up("j")), states(&[Null]));
    assert_eq!(jobs.list(), []);
}

#[test]
fn what_a_state_does_not_allow_is_refused_by_name() {
    let mut jobs = begun(JobType::Create, KEPT);
    assert_eq!(
        jobs.dismiss("j").unwrap_err().to_string(),
        "Job 'j' in state 'running' cannot accept command verb 'dismiss'"
    );
    let _ = (jobs.worked("j"), jobs.succeed("j"));
    for (verb, name) in [
        (Verb::Cancel, "cancel"),
        (Verb::Finalize, "finalize"),
        (Verb::SetSpeed, "set-speed"),
    ] {
        assert_eq!(
            jobs.ask("j", verb).unwrap_err().to_string(),
            format!("Job 'j' in state 'concluded' cannot accept command verb '{name}'")
        );
    }
    assert_eq!(jobs.dismiss("k").unwrap_err().to_string(), "Job not found");
    let missing = jobs.check_block_job("j").unwrap_err();
    assert_eq!(QmpError::from(missing).class, ErrorClass::DeviceNotActive);
}

#[test]
fn ids_are_identifiers_and_belong_to_one_job() {
    let mut jobs = begun(JobType::Create, KEPT);
    let mut refusal = |id: &str| jobs.create(id, JobType::Create, KEPT, None).unwrap_err().to_string();
    assert_eq!(refusal("j"), "Job ID 'j' already in use");
    assert_eq!(refusal("1"), "Invalid job ID '1'");
    assert_eq!(refusal(""), "Invalid job ID ''");
}

#[test]
fn there_are_only_so_many() {
    let mut jobs = Jobs::default();
    for number in 0..MAX_JOBS {
        let _ = jobs.create(&format!("j{number}"), JobType::Create, KEPT, None).unwrap();
    }
    assert_eq!(jobs.create("one", JobType::Create, KEPT, None), Err(JobError::TooMany));
    assert_eq!(
        jobs.list()[0].id,
        format!("j{}", MAX_JOBS - 1),
        "the newest comes first"
    );
}
