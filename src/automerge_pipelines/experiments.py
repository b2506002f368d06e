"""The experiment, in which a server groups runs; where it has several users, it says the namespace."""

import kfp_server_api

from automerge_pipelines.client import KubeflowError, Server


def find_experiment(server: Server, name: str) -> str:
    """The id of the experiment with this name, which is made if there is none.

    Raises:
        KubeflowError: the server does not answer or refuses.
    """
    listed = server.experiments.experiment_service_list_experiments
    for found in server.named(listed, "experiments", name, **server.own()):
        return str(found.experiment_id)
    experiment = kfp_server_api.V2beta1Experiment(display_name=name, **server.own())
    try:
        made = server.ask(server.experiments.experiment_service_create_experiment, experiment)
    except KubeflowError as error:
        if error.status != 409:
            raise
        made = next(server.named(listed, "experiments", name, **server.own()), None)  # someone else was faster
        if made is None:
            raise
    return str(made.experiment_id)
